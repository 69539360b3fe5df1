"""Architectures as `block_configs`, the per-layer list in a child's `config.json` (METHOD section 9).

Written is the published form, which serving engines read (DeciLM, Nemotron-NAS): an attention is `n_heads_in_group`
query heads per KV head, an FFN is `ffn_mult`, from which every engine computes the same width:

    width = int(2 * ffn_mult * hidden / 3), rounded up to a multiple of 256

Read are that form and the one that says sizes outright, `num_key_value_heads` and `intermediate_size`, which our own
checkpoints and those of NVIDIA's Model-Optimizer have.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_core.architecture import Architecture, BlockVariant, Kind, ModelShape, Variant
from puzzle_core.errors import SpecError

WIDTH_GRID = 256
"""Engines round FFN widths up to a multiple of this."""
_MULT_DIGITS = 6
"""Engines may round `ffn_mult` to so many decimals."""
_NEUTRAL = {"weights_precision": "bf16", "hidden_act": "silu", "gated": True}
"""Keys that some writers give, with the one value that changes nothing."""

BlockConfig = dict[str, dict[str, Any]]


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
            f"search with `form: {{ffn_multiple_of: {WIDTH_GRID}}}`"
        )
    return ffn_mult


def width_of(ffn_mult: float, hidden: int) -> int:
    """The FFN width that engines compute from an `ffn_mult`."""
    return -(-int(2 * ffn_mult * hidden / 3) // WIDTH_GRID) * WIDTH_GRID


def to_block_configs(architecture: Architecture, shape: ModelShape) -> list[BlockConfig]:
    """One entry per layer, in the published form; every key is there in every entry, for some readers insist.

    Raises:
        SpecError: the architecture is not one of this parent, or the form cannot carry it; names the layer and variant.
    """
    if len(architecture.layers) != shape.layers:
        raise SpecError(f"the architecture has {len(architecture.layers)} layers, and its parent {shape.layers}")
    entries = []
    for layer, block in enumerate(architecture.layers):
        try:
            entries.append(
                {"attention": _attention_config(block.attention, shape), "ffn": _ffn_config(block.ffn, shape)}
            )
        except SpecError as error:
            raise SpecError(f"layer {layer} {block}: {error}") from error
    return entries


def from_block_configs(entries: Sequence[Any], hidden: int, heads: int) -> Architecture:
    """The architecture that `block_configs` describe.

    Args:
        entries: one per layer, in either form.
        hidden: the hidden width, from which `ffn_mult` counts.
        heads: the number of query heads, from which `n_heads_in_group` counts.

    Raises:
        SpecError: an entry is damaged, or is what no variant of ours is; names the layer and the key.
    """
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise SpecError(f"block_configs must be a list with one entry per layer; found {_brief(entries)}")
    return Architecture(layers=tuple(block_of(entry, hidden, heads, f"layer {n}") for n, entry in enumerate(entries)))


def block_of(entry: Any, hidden: int, heads: int, place: str) -> BlockVariant:
    """The block variant that one entry describes; `place` says in messages where it stands.

    Raises:
        SpecError: as `from_block_configs`.
    """
    entry = _mapping(entry, place)
    for subblock in ("attention", "ffn"):
        if not isinstance(entry.get(subblock), Mapping):
            raise SpecError(f"{place} has no {subblock} (found {_brief(entry)}): a block has attention and ffn")
    _refuse_others(entry, ("attention", "ffn"), place)
    return BlockVariant(
        attention=attention_of(entry["attention"], heads, place), ffn=ffn_of(entry["ffn"], hidden, place)
    )


def attention_of(entry: Any, heads: int, place: str) -> Variant:
    """The attention variant that one entry's `attention` describes.

    Raises:
        SpecError: as `from_block_configs`.
    """
    place = f"{place}, attention"
    entry, kind = _subblock(entry, ("n_heads_in_group", "num_key_value_heads"), place)
    if kind != "sized":
        return Variant("attn", kind)
    kv_heads, group = (_size(entry, key, place, int) for key in ("num_key_value_heads", "n_heads_in_group"))
    if kv_heads is None and group is None:
        raise SpecError(f"{place} is kept, and neither num_key_value_heads nor n_heads_in_group says its size")
    if group is not None and (heads % group or (kv_heads or heads // group) != heads // group):
        also = "" if kv_heads is None else f" and num_key_value_heads {kv_heads}"
        raise SpecError(f"{place}: n_heads_in_group {group}{also} do not go with {heads} query heads")
    size = kv_heads or heads // int(group or 1)
    if heads % size:
        raise SpecError(f"{place}: num_key_value_heads {size} do not divide the {heads} query heads")
    return Variant("attn", "sized", int(size))


def ffn_of(entry: Any, hidden: int, place: str) -> Variant:
    """The FFN variant that one entry's `ffn` describes.

    Raises:
        SpecError: as `from_block_configs`.
    """
    place = f"{place}, ffn"
    entry, kind = _subblock(entry, ("ffn_mult", "intermediate_size"), place)
    if kind != "sized":
        return Variant("ffn", kind)
    width, ffn_mult = _size(entry, "intermediate_size", place, int), _size(entry, "ffn_mult", place, float)
    if width is None and ffn_mult is None:
        raise SpecError(f"{place} is kept, and neither intermediate_size nor ffn_mult says its width")
    return Variant("ffn", "sized", int(width) if width else width_of(ffn_mult or 0.0, hidden))


def _attention_config(variant: Variant, shape: ModelShape) -> dict[str, Any]:
    if variant.kind == "sized":
        shape.check(variant)
    group = shape.heads // variant.size if variant.kind == "sized" else None
    return {"n_heads_in_group": group} | _flags(variant)


def _ffn_config(variant: Variant, shape: ModelShape) -> dict[str, Any]:
    return {"ffn_mult": ffn_mult_of(variant.size, shape.hidden) if variant.kind == "sized" else None} | _flags(variant)


def _flags(variant: Variant) -> dict[str, bool]:
    return {"no_op": variant.kind == "no_op", "replace_with_linear": variant.kind == "linear"}


def _subblock(entry: Any, sizes: tuple[str, str], place: str) -> tuple[Mapping[str, Any], Kind]:
    """One half of a block: what it says, where nothing but `sizes` may be said of its size, and its kind."""
    entry = _mapping(entry, place)
    _refuse_others(entry, ("no_op", "replace_with_linear", *sizes), place)
    flags = {key: entry.get(key, False) for key in ("no_op", "replace_with_linear")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise SpecError(f"{place}: {key} is {_brief(value)}; say true or false")
    if all(flags.values()):
        raise SpecError(f"{place}: no_op and replace_with_linear are both true; it can be one of them")
    return entry, "no_op" if flags["no_op"] else "linear" if flags["replace_with_linear"] else "sized"


def _size(entry: Mapping[str, Any], key: str, place: str, kind: type) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        what = "a whole number above 0" if kind is int else "a number above 0"
        raise SpecError(f"{place}: {key} is {_brief(value)}; it must be {what}")
    return float(value) if kind is float else int(value)


def _refuse_others(entry: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    """What is said beyond the known keys must change nothing: null, false, empty, or neutral."""
    for key, value in entry.items():
        if key not in known and value and _NEUTRAL.get(key) != value:
            raise SpecError(f"{place}: {key} is {_brief(value)}, and no variant here has that: leave such blocks out")


def _mapping(entry: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise SpecError(f"{place} must be an object of keys and values; found {_brief(entry)}")
    return entry


def _brief(value: Any) -> str:
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
