"""What serving engines cannot run, as data with its source: the one table that export and search read. No torch.

Export says what will not run (`obstacles`), a spec with `engines` searches only for what does (spec.py). The tests of
tests/puzzle_core/test_engines.py break every rule and hold the engine's word against it, and docs/engines.md has what
happened. llama.cpp reads the GGUF, which carries everything; the others read the DeciLM directory.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from puzzle_core.architecture import EMPTY_BLOCK, Architecture
from puzzle_core.variants.entries import WIDTH_GRID

Engine = Literal["transformers", "vllm", "sglang", "tensorrt-llm", "llama.cpp"]
Restriction = Literal["no_linear", "width_grid", "attention_first", "one_kv_heads"]


class Rule(NamedTuple):
    """One thing that an engine cannot run, and how that is known."""

    restriction: Restriction
    source: str


_SGLANG = "SGLang 0.5.23's source, not run:"
RULES: dict[Engine, tuple[Rule, ...]] = {
    "transformers": (),
    "vllm": (
        Rule("no_linear", "vLLM 0.32.0 was run: heads // None in layers with replace_with_linear, a TypeError"),
        Rule("attention_first", "vLLM 0.32.0 was run: the first norm expects a residual, a ValueError"),
    ),
    "sglang": (
        Rule("no_linear", f"{_SGLANG} replace_with_linear is not read, as in vLLM"),
        Rule("width_grid", f"{_SGLANG} widths come from ffn_mult alone, rounded up to the grid"),
        Rule("one_kv_heads", f"{_SGLANG} model_config.py raises for 'Variable GQA' of nemotron-nas"),
    ),
    "tensorrt-llm": (
        Rule("width_grid", "TensorRT-LLM's PyTorch backend's source, not run: widths come from ffn_mult, rounded up"),
    ),
    "llama.cpp": (),
}
NAMES: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM"}
"""How engines are written in sentences, where that is not their name in a spec."""


def restrictions(engines: Sequence[Engine]) -> frozenset[Restriction]:
    """What at least one of these engines cannot run."""
    return frozenset(rule.restriction for engine in engines for rule in RULES[engine])


def obstacles(architecture: Architecture) -> dict[str, list[str]]:
    """By engine that reads the directory, why it does not run this architecture; empty lists where it does."""
    found = {restriction: broken(architecture) for restriction, broken in _BROKEN.items()}
    readers = {engine: rules for engine, rules in RULES.items() if engine != "llama.cpp"}
    return {
        NAMES.get(engine, engine): [why for rule in rules if (why := found[rule.restriction])]
        for engine, rules in readers.items()
    }


def _linear(architecture: Architecture) -> str | None:
    variants = [(n, v) for n, b in enumerate(architecture.layers) for v in b.subblocks]
    linear = [f"layer {layer} {variant}" for layer, variant in variants if "no_linear" in variant.row.restricted_by]
    return f"has no linear subblocks ({', '.join(linear)})" if linear else None


def _off_grid(architecture: Architecture) -> str | None:
    off_grid = [f"layer {n} {b.ffn}" for n, b in enumerate(architecture.layers) if b.ffn.ffn_width % WIDTH_GRID]
    return f"takes FFN widths in steps of {WIDTH_GRID} ({', '.join(off_grid)})" if off_grid else None


def _no_attention_first(architecture: Architecture) -> str | None:
    blocks = enumerate(architecture.layers)
    first = next(((n, b) for n, b in blocks if b != EMPTY_BLOCK), None)
    if first and not first[1].attention.is_empty:
        return None
    return f"fails where the first layer that is not empty (layer {first[0] if first else 0}) has no attention"


def _several_kv_heads(architecture: Architecture) -> str | None:
    kv_heads = sorted({block.attention.kv_heads for block in architecture.layers} - {0})
    listed = ", ".join(map(str, kv_heads))
    return f"wants one number of KV heads in all layers that attend (here {listed})" if len(kv_heads) > 1 else None


_BROKEN: dict[Restriction, Callable[[Architecture], str | None]] = {
    "no_linear": _linear,
    "width_grid": _off_grid,
    "attention_first": _no_attention_first,
    "one_kv_heads": _several_kv_heads,
}
"""By restriction, what of an architecture breaks it."""
