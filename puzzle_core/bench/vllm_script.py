"""Times models in vLLM: `python vllm_script.py ANSWER.json`, with the request as JSON on stdin.

It runs in an environment with vLLM and without this project. All models are loaded and take turns in every round: whole
requests are timed with one generated token and with all generated tokens; the difference is decoding. Times are
wall-clock times through vLLM's own engine, with its scheduling.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Write vLLM's version and, per traffic and model, the milliseconds of every round."""
    request = json.load(sys.stdin)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    import torch
    import vllm  # type: ignore[import-not-found]

    longest = max(t["prompt_tokens"] + t["generated_tokens"] for t in request["traffics"])
    gpu = {"gpu_memory_utilization": 0.9 / len(request["directories"])} if torch.cuda.is_available() else {}
    engines = {
        name: vllm.LLM(
            directory,
            trust_remote_code=True,
            dtype=request["dtype"],
            max_model_len=longest,
            enforce_eager=not torch.cuda.is_available(),
            enable_prefix_caching=False,
            disable_log_stats=True,
            **gpu,
        )
        for name, directory in request["directories"].items()
    }
    times = [_rounds(vllm, engines, traffic, request["rounds"]) for traffic in request["traffics"]]
    Path(sys.argv[1]).write_text(json.dumps({"version": vllm.__version__, "times": times}))


def _rounds(vllm: Any, engines: dict[str, Any], traffic: dict[str, int], rounds: int) -> dict[str, Any]:
    """Milliseconds of all models at one traffic, by model and phase; the first round is a warm-up."""
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            first, whole = (_ms(vllm, engine, traffic, tokens) for tokens in (1, traffic["generated_tokens"]))
            if number:
                times[name]["prefill"].append(first)
                times[name]["decode"].append(whole - first)
    return times


def _ms(vllm: Any, engine: Any, traffic: dict[str, int], tokens: int) -> float:
    """Milliseconds of one batch of requests with this many generated tokens."""
    prompts = [{"prompt_token_ids": [1] * traffic["prompt_tokens"]} for _ in range(traffic["batch_size"])]
    settings = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    engine.generate(prompts, settings, use_tqdm=False)
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
