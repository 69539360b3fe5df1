"""Architectures as `block_configs`, the per-layer list in a child's `config.json` (METHOD section 9).

Serving engines read the published form (DeciLM, Nemotron-NAS), which gives sizes as `n_heads_in_group` and `ffn_mult`.
Our own checkpoints and those of NVIDIA's Model-Optimizer give them as `num_key_value_heads` and `intermediate_size`.
Both forms are read. What an entry says of each kind is in the rows of variants/kinds.py, and the arithmetic of sizes in
variants/entries.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.errors import SpecError
from puzzle_core.variants.entries import brief, whole_number
from puzzle_core.variants.kinds import WINDOW_KEY, Subblock, kinds_of

_KEYS: dict[str, Subblock] = {"attention": "attn", "ffn": "ffn"}
"""The keys of a block's entry."""
_FLAGS = {"no_op": False, "replace_with_linear": False}
"""Flags that every entry has, because some readers insist on them; other kinds have theirs where it is true."""
_NEUTRAL = {"weights_precision": "bf16", "hidden_act": "silu", "gated": True}
"""Keys that some writers give, with the one value that changes nothing."""

BlockConfig = dict[str, dict[str, Any]]


def block_config(block: BlockVariant) -> BlockConfig:
    """A block variant as an entry in the form of our own checkpoints."""
    return {
        key: variant.row.entry(variant.size) | _window(variant) | _flags(variant)
        for key, variant in zip(_KEYS, block.subblocks, strict=True)
    }


def to_block_configs(architecture: Architecture, shape: ModelShape) -> list[BlockConfig]:
    """One entry per layer, in the published form; every key is there in every entry, for some readers insist.

    Raises:
        SpecError: the architecture is not one of this parent, or the form cannot carry it; names the layer and variant.
    """
    if len(architecture.layers) != shape.layers:
        raise SpecError(f"the architecture has {len(architecture.layers)} layers, and its parent {shape.layers}")
    entries: list[BlockConfig] = []
    for layer, block in enumerate(architecture.layers):
        try:
            pairs = zip(_KEYS, block.subblocks, strict=True)
            entries.append({key: _published_entry(variant, shape.of_layer(layer)) for key, variant in pairs})
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
        raise SpecError(f"block_configs must be a list with one entry per layer; found {brief(entries)}")
    return Architecture(layers=tuple(block_of(entry, hidden, heads, f"layer {n}") for n, entry in enumerate(entries)))


def block_of(entry: Any, hidden: int, heads: int, place: str) -> BlockVariant:
    """The block variant that one entry describes; `place` says in messages where it stands.

    Raises:
        SpecError: as `from_block_configs`.
    """
    entry = _mapping(entry, place)
    for key in _KEYS:
        if not isinstance(entry.get(key), Mapping):
            raise SpecError(f"{place} has no {key} (found {brief(entry)}): a block has attention and ffn")
    _refuse_others(entry, tuple(_KEYS), place)
    return BlockVariant(
        **{key: variant_of(entry[key], subblock, hidden, heads, f"{place}, {key}") for key, subblock in _KEYS.items()}
    )


def variant_of(entry: Any, subblock: Subblock, hidden: int, heads: int, place: str) -> Variant:
    """The variant that the entry of one subblock describes.

    Raises:
        SpecError: as `from_block_configs`.
    """
    entry, rows = _mapping(entry, place), kinds_of(subblock)
    flags = {row.flag: entry.get(row.flag, False) for row in rows if row.flag}
    windows = (WINDOW_KEY,) * any(row.windowed for row in rows)
    _refuse_others(entry, (*flags, *windows, *(key for row in rows for key in row.size_keys)), place)
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise SpecError(f"{place}: {key} is {brief(value)}; use true or false")
    true_flags = [key for key, value in flags.items() if value]
    if len(true_flags) > 1:
        raise SpecError(f"{place}: {' and '.join(sorted(true_flags))} are both true; it can be one of them")
    window = whole_number(entry, WINDOW_KEY, place) if windows else None
    told = true_flags[0] if true_flags else None, window is not None
    row = next((row for row in rows if (row.flag, row.windowed) == told), None)
    if row is None:
        raise SpecError(f"{place}: {WINDOW_KEY} is {window} and {told[0]} is true; it can be one of them")
    return Variant(subblock, row.name, row.entry_size(entry, hidden, heads, place), window or 0)


def _published_entry(variant: Variant, shape: ModelShape) -> dict[str, Any]:
    if variant.row.published_entry is None:
        raise SpecError(f"the published form has no place for {variant}")
    if variant.kv_heads:
        shape.check(variant)
    return variant.row.published_entry(shape, variant.size) | _flags(variant)


def _window(variant: Variant) -> dict[str, int]:
    return {WINDOW_KEY: variant.window} if variant.row.windowed else {}


def _flags(variant: Variant) -> dict[str, bool]:
    flag = variant.row.flag
    return _FLAGS | ({flag: True} if flag else {})


def _refuse_others(entry: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    """What is said beyond the known keys must change nothing: null, false, empty, or neutral."""
    for key, value in entry.items():
        if key not in known and value and _NEUTRAL.get(key) != value:
            raise SpecError(f"{place}: {key} is {brief(value)}, and no variant here has that: leave such blocks out")


def _mapping(entry: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise SpecError(f"{place} must be an object of keys and values; found {brief(entry)}")
    return entry
