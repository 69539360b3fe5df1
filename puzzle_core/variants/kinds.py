"""The registry of variant kinds: one row for everything in which kinds differ (METHOD sections 1, 2, 5 and 9).

A row is a `VariantKind`; `KINDS` has them by subblock and name, and every other part of the project reads the row of a
variant (`Variant.row`) instead of asking for its kind. CONTRIBUTING.md says how a kind is added.

Layout of the folder: kinds.py and entries.py know no variants, only sizes, and import nothing of this project but
errors, so that architecture.py can read the registry. attention.py and ffn.py have the initial weights. They need
torch, so a row has the name of its function, which is imported when it is called.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from puzzle_core.variants.entries import ffn_mult_of, ffn_width_of, kv_heads_of

if TYPE_CHECKING:
    import torch

Subblock = Literal["attn", "ffn"]
_ID = re.compile(r"([a-z]+):([a-z_]+)([0-9]{0,12})(?::w([0-9]{1,12}))?")


class ParentShape(Protocol):
    """What rows read of a parent; architecture.py's `ModelShape` is one."""

    @property
    def family(self) -> str: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_width(self) -> int: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def attention_out_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def qk_norm_whole(self) -> bool: ...
    @property
    def gated(self) -> bool: ...


OfShape = Callable[[ParentShape, int], int]
"""A number from the parent's shape and the variant's size (0 where the kind has none)."""


def _nothing(shape: ParentShape, size: int) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class VariantKind:
    """One kind of subblock variant.

    Attributes:
        subblock: which subblock of a layer it takes the place of.
        name: its name in code; lists of variants inside keys are sorted by it.
        word: how it is written in ids, `attn:WORD`, or `attn:WORD4` where it has a size.
        sized: whether its variants have a size.
        windowed: whether its variants have a window too, `attn:WORD4:w1024`: a token sees so many tokens, itself
            included.
        in_window: the name of the kind that is this one within a window; None where it does not attend.
        order: place in lists, where kinds stand from the most capable to nothing; larger sizes stand first within one.
        spec_field: the field of `variants` in a spec that offers it: a list of sizes, or a switch. Without one it is
            offered by ids alone (`variants.ids`).
        constraint_field: the switch of `constraints` that allows it; without one it is always allowed.
        restricted_by: restrictions of engines (puzzle_core/engines.py) that rule the kind out altogether.
        parameters: weights and biases of its modules, the norm in front not counted.
        keeps_norm: whether the norm in front of the subblock stays.
        kv_heads: KV heads by size; 0 where it does not attend.
        kv_entries: entries of the KV cache per token.
        ffn_width: intermediate width by size; 0 where it is no gated FFN.
        context_operations: floating-point operations per token and per token of context, beside those with weights.
        inner_channels: activations per token between its products, each written once and read once.
        problem: why a parent cannot have this size, to follow `variant ID`; None where it can.
        fits_devices: whether so many devices can share a variant of this size (tensor parallelism).
        linear_bias: for a single linear layer, whether it has a bias; None for every other kind.
        initial_weights: the function that makes them, `module:function`; None where there are no weights to train.
        other_weights: functions that make other ones, by name, for `bld.initial_weights: best`.
        needs_contributions: whether initial weights need the contributions of the parent's FFN channels.
        flag: the key that is true in its `block_configs` entry; None where sizes alone are given.
        entry: the sizes in its entry of our own checkpoints.
        published_entry: the sizes in its entry of the published form; None where no export can carry the kind.
        size_keys: every key of `entry` and `published_entry`.
        entry_size: the size that an entry gives, of hidden width and query heads; raises SpecError, naming the place.
    """

    subblock: Subblock
    name: str
    word: str
    sized: bool = False
    windowed: bool = False
    in_window: str | None = None
    order: int
    spec_field: str | None = None
    constraint_field: str | None = None
    restricted_by: frozenset[str] = frozenset()
    parameters: OfShape = _nothing
    keeps_norm: bool = True
    kv_heads: Callable[[int], int] = lambda size: 0
    kv_entries: OfShape = _nothing
    ffn_width: Callable[[int], int] = lambda size: 0
    context_operations: OfShape = _nothing
    inner_channels: OfShape = _nothing
    problem: Callable[[ParentShape, int], str | None] = lambda shape, size: None
    fits_devices: Callable[[int, int], bool] = lambda size, devices: True
    linear_bias: Callable[[ParentShape], bool] | None = None
    initial_weights: str | None = None
    other_weights: Mapping[str, str] = field(default_factory=dict)
    needs_contributions: bool = False
    flag: str | None = None
    entry: Callable[[int], dict[str, Any]]
    published_entry: Callable[[ParentShape, int], dict[str, Any]] | None
    size_keys: tuple[str, ...]
    entry_size: Callable[[Mapping[str, Any], int, int, str], int] = lambda entry, hidden, heads, place: 0

    @property
    def title(self) -> str:
        """The kind as the start of its ids names it: `attn:kv`; with a window `attn:kv:w`."""
        return f"{self.subblock}:{self.word}{':w' if self.windowed else ''}"

    @property
    def pattern(self) -> str:
        """The regular expression of its ids."""
        size, window = ("[1-9][0-9]*" if has else "" for has in (self.sized, self.windowed))
        return f"{self.subblock}:{self.word}{size}{window and f':w{window}'}"

    def initial_state(
        self,
        layer: "Mapping[str, torch.Tensor]",
        shape: ParentShape,
        size: int,
        contribution_I: "torch.Tensor | None" = None,
    ) -> "dict[str, torch.Tensor]":
        """Training-free weights of a variant, by their names within the layer; none where the kind has no weights.

        Args:
            layer: the parent layer's tensors, by their names within the layer.
            contribution_I: how much each channel of the parent's FFN contributes, for kinds that need it.
        """
        if self.initial_weights is None:
            return {}
        make = _function(self.initial_weights)
        return make(dict(layer), shape, size, contribution_I)  # type: ignore[no-any-return]

    def other_states(
        self, layer: "Mapping[str, torch.Tensor]", shape: ParentShape, size: int, inner_NI: "torch.Tensor"
    ) -> "dict[str, dict[str, torch.Tensor]]":
        """Other training-free weights, by the name of the way that they are made.

        Args:
            inner_NI: what enters the last projection of the parent's own subblock, for N tokens.
        """
        makers = {name: _function(place) for name, place in self.other_weights.items()}
        return {name: make(dict(layer), shape, size, inner_NI) for name, make in makers.items()}


def _function(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _kv_heads_problem(shape: ParentShape, size: int) -> str | None:
    if shape.kv_heads % size == 0:
        return None
    divisors = [number for number in range(1, shape.kv_heads + 1) if shape.kv_heads % number == 0]
    return f"does not fit: {size} KV heads do not divide the parent's {shape.kv_heads}; use one of {divisors}"


def _width_problem(shape: ParentShape, size: int) -> str | None:
    if size <= shape.ffn_width:
        return None
    return f"is wider than the parent's FFN ({shape.ffn_width}): use a smaller width"


def _attention_parameters(shape: ParentShape, kv_heads: int) -> int:
    query, key_value = shape.heads * shape.head_dim, kv_heads * shape.head_dim
    weights = 2 * shape.hidden * query + 2 * shape.hidden * key_value
    biases = shape.qkv_bias * (query + 2 * key_value) + shape.attention_out_bias * shape.hidden
    norms = query + key_value if shape.qk_norm_whole else 2 * shape.head_dim
    return weights + biases + shape.qk_norm * norms


def _ffn_parameters(shape: ParentShape, width: int) -> int:
    channels = (1 + shape.gated) * width
    return shape.hidden * (channels + width) + shape.mlp_bias * (channels + shape.hidden)


def _attention_bias(shape: ParentShape) -> bool:
    return shape.qkv_bias or shape.attention_out_bias


def _ffn_bias(shape: ParentShape) -> bool:
    return shape.mlp_bias


WINDOW_KEY = "sliding_window"
"""The key of a window in the `block_configs` entry of an attention."""
_ATTENTION_KEYS = ("n_heads_in_group", "num_key_value_heads")
_FFN_KEYS = ("ffn_mult", "intermediate_size")

_SIZED_ATTENTION = VariantKind(
    subblock="attn",
    name="sized",
    word="kv",
    sized=True,
    in_window="window",
    order=0,
    spec_field="kv_heads",
    parameters=_attention_parameters,
    kv_heads=lambda size: size,
    kv_entries=lambda shape, size: 2 * size * shape.head_dim,
    context_operations=lambda shape, size: 4 * shape.heads * shape.head_dim,
    inner_channels=lambda shape, size: 2 * 2 * (shape.heads + size) * shape.head_dim,
    problem=_kv_heads_problem,
    fits_devices=lambda size, devices: size % devices == 0 or devices % size == 0,
    initial_weights="puzzle_core.variants.attention:pooled_attention",
    other_weights={
        "first": "puzzle_core.variants.attention:first_heads",
        "largest": "puzzle_core.variants.attention:largest_heads",
    },
    entry=lambda size: {"num_key_value_heads": size},
    published_entry=lambda shape, size: {"n_heads_in_group": shape.heads // size},
    size_keys=_ATTENTION_KEYS,
    entry_size=lambda entry, hidden, heads, place: kv_heads_of(entry, heads, place),
)

_ROWS = (
    _SIZED_ATTENTION,
    replace(
        _SIZED_ATTENTION,
        name="window",
        windowed=True,
        order=1,
        spec_field="windows",
        restricted_by=frozenset({"no_windows"}),
        published_entry=None,
    ),
    VariantKind(
        subblock="attn",
        name="linear",
        word="linear",
        order=2,
        spec_field="linear",
        constraint_field="linear",
        restricted_by=frozenset({"no_linear"}),
        parameters=lambda shape, size: shape.hidden * shape.hidden + _attention_bias(shape) * shape.hidden,
        linear_bias=_attention_bias,
        initial_weights="puzzle_core.variants.attention:linear_attention",
        flag="replace_with_linear",
        entry=lambda size: {"num_key_value_heads": None},
        published_entry=lambda shape, size: {"n_heads_in_group": None},
        size_keys=_ATTENTION_KEYS,
    ),
    VariantKind(
        subblock="attn",
        name="no_op",
        word="no_op",
        order=3,
        spec_field="no_op",
        constraint_field="no_op",
        keeps_norm=False,
        flag="no_op",
        entry=lambda size: {"num_key_value_heads": None},
        published_entry=lambda shape, size: {"n_heads_in_group": None},
        size_keys=_ATTENTION_KEYS,
    ),
    VariantKind(
        subblock="ffn",
        name="sized",
        word="i",
        sized=True,
        order=0,
        spec_field="ffn_widths",
        parameters=_ffn_parameters,
        ffn_width=lambda size: size,
        inner_channels=lambda shape, size: 2 * size,
        problem=_width_problem,
        fits_devices=lambda size, devices: size % devices == 0,
        initial_weights="puzzle_core.variants.ffn:pruned_ffn",
        other_weights={"iterative": "puzzle_core.variants.ffn:iteratively_pruned_ffn"},
        needs_contributions=True,
        entry=lambda size: {"intermediate_size": size},
        published_entry=lambda shape, size: {"ffn_mult": ffn_mult_of(size, shape.hidden)},
        size_keys=_FFN_KEYS,
        entry_size=lambda entry, hidden, heads, place: ffn_width_of(entry, hidden, place),
    ),
    VariantKind(
        subblock="ffn",
        name="linear",
        word="linear",
        order=1,
        spec_field="linear",
        constraint_field="linear",
        restricted_by=frozenset({"no_linear"}),
        parameters=lambda shape, size: shape.hidden * shape.hidden + _ffn_bias(shape) * shape.hidden,
        linear_bias=_ffn_bias,
        initial_weights="puzzle_core.variants.ffn:linear_ffn",
        flag="replace_with_linear",
        entry=lambda size: {"intermediate_size": None},
        published_entry=lambda shape, size: {"ffn_mult": None},
        size_keys=_FFN_KEYS,
    ),
    VariantKind(
        subblock="ffn",
        name="no_op",
        word="no_op",
        order=2,
        spec_field="no_op",
        constraint_field="no_op",
        keeps_norm=False,
        flag="no_op",
        entry=lambda size: {"intermediate_size": None},
        published_entry=lambda shape, size: {"ffn_mult": None},
        size_keys=_FFN_KEYS,
    ),
)

KINDS: dict[tuple[Subblock, str], VariantKind] = {(row.subblock, row.name): row for row in _ROWS}
"""Every kind, by subblock and name."""


def kinds_of(subblock: Subblock) -> list[VariantKind]:
    """The kinds of one subblock, from the most capable to nothing."""
    return sorted((row for row in KINDS.values() if row.subblock == subblock), key=lambda row: row.order)


def parse_id(text: str) -> tuple[VariantKind, int, int]:
    """The kind, the size and the window that a variant id names; 0 where the kind has none.

    Raises:
        ValueError: no variant has this id.
    """
    if match := _ID.fullmatch(text):
        subblock, word, *numbers = match.groups(default="")
        for row in KINDS.values():
            named = (row.subblock, row.word, row.sized, row.windowed) == (subblock, word, *map(bool, numbers))
            if named and all(int(digits) for digits in numbers if digits):
                size, window = (int(digits or 0) for digits in numbers)
                return row, size, window
    raise ValueError(
        f"{text!r} is no variant id: use attn:kv4, attn:kv4:w1024, attn:linear, attn:no_op, ffn:i512 and so on"
    )


def id_pattern() -> str:
    """The regular expression of all variant ids."""
    return f"^({'|'.join(row.pattern for row in KINDS.values())})$"
