"""A subblock as an entry of `block_configs`: its size in both forms, written and read (METHOD section 9).

The published form (DeciLM, Nemotron-NAS) gives an attention as `n_heads_in_group`, the query heads per KV head, and an
FFN as `ffn_mult`, from which every engine computes the same width:

    width = int(2 * ffn_mult * hidden / 3), rounded up to a multiple of 256

Our own checkpoints, and those of NVIDIA's Model-Optimizer, give the sizes themselves: `num_key_value_heads` and
`intermediate_size`. The rows of kinds.py name these functions, and formats/block_configs.py uses them.
"""

from collections.abc import Mapping
from typing import Any

from puzzle_core.errors import SpecError

WIDTH_GRID = 256
"""Engines round FFN widths up to a multiple of this."""
_MULT_DIGITS = 6
"""Engines may round `ffn_mult` to so many decimals."""

SubblockEntry = Mapping[str, Any]


def ffn_mult_of(width: int, hidden: int) -> float:
    """The `ffn_mult` of an FFN width, such that engines compute this width from it.

    Raises:
        SpecError: no `ffn_mult` gives this width.
    """
    ffn_mult = round(3 * width / (2 * hidden), _MULT_DIGITS)
    if width_of(ffn_mult, hidden) != width:
        raise SpecError(
            f"block_configs cannot carry an FFN of width {width} (hidden {hidden}): engines round widths up to a "
            f"multiple of {WIDTH_GRID} and would take {width_of(ffn_mult, hidden)}; "
            f"search with `constraints: {{ffn_multiple_of: {WIDTH_GRID}}}`"
        )
    return ffn_mult


def width_of(ffn_mult: float, hidden: int) -> int:
    """The FFN width that engines compute from an `ffn_mult`."""
    return -(-int(2 * ffn_mult * hidden / 3) // WIDTH_GRID) * WIDTH_GRID


def kv_heads_of(entry: SubblockEntry, heads: int, place: str) -> int:
    """The KV heads that an attention's entry gives, in either form.

    Raises:
        SpecError: it gives none, or a number that does not divide the query heads; `place` names the entry.
    """
    kv_heads, group = (_size(entry, key, place, int) for key in ("num_key_value_heads", "n_heads_in_group"))
    if kv_heads is None and group is None:
        raise SpecError(f"{place} is kept, and neither num_key_value_heads nor n_heads_in_group says its size")
    if group is not None and (heads % group or (kv_heads or heads // group) != heads // group):
        also = "" if kv_heads is None else f" and num_key_value_heads {kv_heads}"
        raise SpecError(f"{place}: n_heads_in_group {group}{also} do not go with {heads} query heads")
    size = kv_heads or heads // int(group or 1)
    if heads % size:
        raise SpecError(f"{place}: num_key_value_heads {size} do not divide the {heads} query heads")
    return int(size)


def ffn_width_of(entry: SubblockEntry, hidden: int, place: str) -> int:
    """The width that an FFN's entry gives, in either form.

    Raises:
        SpecError: it gives none; `place` names the entry.
    """
    width, ffn_mult = _size(entry, "intermediate_size", place, int), _size(entry, "ffn_mult", place, float)
    if width is None and ffn_mult is None:
        raise SpecError(f"{place} is kept, and neither intermediate_size nor ffn_mult says its width")
    return int(width) if width else width_of(ffn_mult or 0.0, hidden)


def whole_number(entry: SubblockEntry, key: str, place: str) -> int | None:
    """The whole number above 0 under a key; None where the entry has none.

    Raises:
        SpecError: it is something else; `place` names the entry.
    """
    number = _size(entry, key, place, int)
    return None if number is None else int(number)


def _size(entry: SubblockEntry, key: str, place: str, kind: type) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        what = "a whole number above 0" if kind is int else "a number above 0"
        raise SpecError(f"{place}: {key} is {brief(value)}; it must be {what}")
    return float(value) if kind is float else int(value)


def brief(value: Any) -> str:
    """A value as messages show it: at most 80 characters."""
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
