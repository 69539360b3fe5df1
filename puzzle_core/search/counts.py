"""Counts that a limit can bound: layers with an attention, KV heads, layers with one variant or kind of variants."""

from collections.abc import Callable

from puzzle_core.architecture import BlockVariant, variants_named
from puzzle_core.spec import LimitsSpec

UNITS = {"attention_layers": "layers", "kv_heads": "heads"}
"""The counts that have a limit of their own, and their units."""


def counter(limit: str, limits: LimitsSpec) -> Callable[[BlockVariant], float] | None:
    """What a limit counts in a block: `attention_layers`, `kv_heads`, a name in `limits.counts`; None for no count."""
    if limit == "attention_layers":
        return lambda block: float(block.attention.kv_heads > 0)
    if limit == "kv_heads":
        return lambda block: float(block.attention.kv_heads)
    if limit in limits.counts:
        named = variants_named(limit)
        return lambda block: float(any(named(variant) for variant in block.subblocks))
    return None
