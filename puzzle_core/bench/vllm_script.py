"""Runs in an environment with vLLM, without this project: `python bench_vllm.py ANSWER.json`, what is asked on stdin.

All models are loaded, and take turns in every round: the time of whole requests with one generated token, and with all
of them, whose difference is decoding. Times are the wall's, through vLLM's own engine, its scheduling included.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Answer with vLLM's version and, per traffic and model, milliseconds of every round."""
    asked = json.load(sys.stdin)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(asked["threads"])
    import torch
    import vllm  # type: ignore[import-not-found]

    longest = max(t["prompt_tokens"] + t["generated_tokens"] for t in asked["traffics"])
    gpu = {"gpu_memory_utilization": 0.9 / len(asked["directories"])} if torch.cuda.is_available() else {}
    engines = {
        name: vllm.LLM(
            directory,
            trust_remote_code=True,
            dtype=asked["dtype"],
            max_model_len=longest,
            enforce_eager=not torch.cuda.is_available(),
            enable_prefix_caching=False,
            disable_log_stats=True,
            **gpu,
        )
        for name, directory in asked["directories"].items()
    }
    times = [_rounds(vllm, engines, traffic, asked["rounds"]) for traffic in asked["traffics"]]
    Path(sys.argv[1]).write_text(json.dumps({"version": vllm.__version__, "times": times}))


def _rounds(vllm: Any, engines: dict[str, Any], traffic: dict[str, int], rounds: int) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            first, whole = (_ms(vllm, engine, traffic, tokens) for tokens in (1, traffic["generated_tokens"]))
            if number:
                found[name]["prefill"].append(first)
                found[name]["decode"].append(whole - first)
    return found


def _ms(vllm: Any, engine: Any, traffic: dict[str, int], tokens: int) -> float:
    prompts = [{"prompt_token_ids": [1] * traffic["prompt_tokens"]} for _ in range(traffic["batch_size"])]
    wanted = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    engine.generate(prompts, wanted, use_tqdm=False)
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
