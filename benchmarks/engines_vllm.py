"""Runs exported children in vLLM, without this project: `python engines_vllm.py ANSWER.json`.

The cases come on stdin. The answer has for every exported directory the log-probabilities of the given tokens
and of vLLM's own greedy continuation.
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities: of the prompt from its second token on, then of what was generated."""
    from vllm import LLM, SamplingParams

    engine = LLM(case["directory"], trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=64)
    try:
        wanted = SamplingParams(temperature=0, max_tokens=case["steps"], ignore_eos=True, logprobs=0, prompt_logprobs=0)
        output = engine.generate({"prompt_token_ids": case["ids"]}, wanted, use_tqdm=False)[0]
        tokens = output.outputs[0].token_ids
        steps = [*zip(case["ids"], output.prompt_logprobs, strict=True)][1:]
        steps += zip(tokens, output.outputs[0].logprobs, strict=True)
        return {"ids": list(tokens), "logs": [found[token].logprob for token, found in steps]}
    finally:
        with contextlib.suppress(Exception):
            engine.llm_engine.engine_core.shutdown()
        gc.collect()


def main() -> None:
    """Answer all cases; what an engine raises is an answer too."""
    import vllm

    answers: list[Any] = [vllm.__version__]
    for case in json.load(sys.stdin):
        try:
            answers.append(answer(case))
        except Exception as error:
            answers.append(
                {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"}
            )
        Path(sys.argv[1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
