"""The shape of a parent, the variants of its subblocks, and architectures (METHOD section 1).

A layer has two subblocks, attention and FFN. A variant is one alternative for a subblock and has an id:

    attn:kv4  attn:linear  attn:no_op        grouped-query attention with 4 KV heads, one linear layer, nothing
    attn:kv4:w1024                           the same attention within a window: a token sees itself and 1023 before it
    ffn:i8704 ffn:linear   ffn:no_op         gated FFN of intermediate width 8704, one linear layer, nothing

Every kind is a row of variants/kinds.py. A block variant is a pair of variants (`attn:kv4+ffn:i8704`), an architecture
one block variant per layer, or in the place of several layers (`attn:kv4+ffn:i8704 x2`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple, Self

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, WithJsonSchema, model_validator

from puzzle_core.errors import SpecError
from puzzle_core.records import Record
from puzzle_core.variants.kinds import KINDS, Subblock, VariantKind, id_pattern, parse_id


@dataclass(frozen=True, order=True)
class Variant:
    """One alternative for a subblock: a kind (variants/kinds.py), a size and a window, 0 if the kind has none.

    The size of an attention is its number of KV heads, that of an FFN its intermediate width. A window is in tokens.
    """

    subblock: Subblock
    kind: str
    size: int = 0
    window: int = 0

    @classmethod
    def parse(cls, value: "str | Variant") -> "Variant":
        """The variant with this id.

        Raises:
            ValueError: no variant has this id.
        """
        if isinstance(value, Variant):
            return value
        row, size, window = parse_id(value)
        return cls(row.subblock, row.name, size, window)

    def __str__(self) -> str:
        row = self.row
        return f"{self.subblock}:{row.word}{self.size if row.sized else ''}{f':w{self.window}' if row.windowed else ''}"

    @property
    def row(self) -> VariantKind:
        """The row of its kind."""
        return KINDS[self.subblock, self.kind]

    @property
    def is_empty(self) -> bool:
        """Whether it removes the subblock."""
        return self.row.initial_weights is None

    @property
    def kv_heads(self) -> int:
        """Its number of KV heads; 0 if it has no attention."""
        return self.row.kv_heads(self.size)

    def seen(self, tokens: int) -> int:
        """The tokens of a context of so many that its last token sees, and so the tokens in its KV cache."""
        return min(tokens, self.window) if self.row.windowed else tokens

    @property
    def ffn_width(self) -> int:
        """Its intermediate width; 0 if it is not a gated FFN."""
        return self.row.ffn_width(self.size)

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """Sort key for the variants of a subblock: the most capable kind first, then the larger size, no-op last."""
        return self.row.order, -self.size, -self.window, self.kind


def in_window(variant: Variant, window: int) -> Variant:
    """The variant within a window of so many tokens, where it attends and sees more."""
    kind = variant.row.in_window
    return variant if kind is None or 0 < variant.window <= window else replace(variant, kind=kind, window=window)


def variants_named(name: str) -> Callable[[Variant], bool]:
    """Whether a variant is the one with this id (`attn:kv4`), or one of this kind.

    Kinds are `attn:kv`, `attn:kv:w` (within a window), `ffn:i`, `ffn:no_op` and so on.

    Raises:
        ValueError: neither a variant nor a kind has this name.
    """
    for row in KINDS.values():
        if name == row.title:
            return lambda variant: variant.row is row
    one = Variant.parse(name)
    return lambda variant: variant == one


VariantId = Annotated[
    Variant,
    BeforeValidator(Variant.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": id_pattern()}),
]


class BlockVariant(Record):
    """An attention variant and an FFN variant: one layer of a child."""

    attention: VariantId
    ffn: VariantId

    @model_validator(mode="after")
    def _check_subblocks(self) -> Self:
        if (self.attention.subblock, self.ffn.subblock) != ("attn", "ffn"):
            raise ValueError(f"{str(self)!r} is not a block variant: give one such as attn:kv4+ffn:i512")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """The block variant with this id, for instance `attn:kv4+ffn:i512`."""
        attention, _, ffn = text.partition("+")
        return cls(attention=Variant.parse(attention), ffn=Variant.parse(ffn))

    @property
    def subblocks(self) -> tuple[Variant, Variant]:
        """The attention variant and the FFN variant."""
        return self.attention, self.ffn

    def with_variant(self, variant: Variant) -> Self:
        """This block with one subblock variant replaced."""
        return self.model_copy(update={"attention" if variant.subblock == "attn" else "ffn": variant})

    def __str__(self) -> str:
        return f"{self.attention}+{self.ffn}"


BlockId = Annotated[
    BlockVariant,
    BeforeValidator(lambda value: BlockVariant.parse(value) if isinstance(value, str) else value),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}),
]
NO_ATTENTION, NO_FFN = Variant("attn", "no_op"), Variant("ffn", "no_op")
EMPTY_BLOCK = BlockVariant(attention=NO_ATTENTION, ffn=NO_FFN)


class Option(NamedTuple):
    """A block variant that replaces `span` consecutive layers; all but the first become empty blocks."""

    block: BlockVariant
    span: int = 1

    @classmethod
    def parse(cls, text: str) -> "Option":
        """The option with this id: a block variant's, or with ` x2` one that replaces two layers."""
        block, times, span = text.partition(" x")
        if times and not (span.isdecimal() and int(span) > 1):
            raise ValueError(f"{text!r} is no option: write the number of layers as in attn:kv4+ffn:i512 x2")
        return cls(BlockVariant.parse(block), int(span) if times else 1)

    def __str__(self) -> str:
        return str(self.block) if self.span == 1 else f"{self.block} x{self.span}"


def parse_trained(value: "str | Variant | Option") -> "Variant | Option":
    """What a training or an artifact of the library is of: a subblock's variant, or an option whose halves are one."""
    if not isinstance(value, str):
        return value
    return Option.parse(value) if "+" in value else Variant.parse(value)


TrainedId = Annotated[
    InstanceOf[Variant] | InstanceOf[Option],
    BeforeValidator(parse_trained),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}),
]


class Architecture(Record):
    """One block variant per layer.

    `spans` has (first layer, number of layers) of every block that replaces more than one layer; the others of its
    layers are empty, and a child does not have them.
    """

    layers: tuple[BlockVariant, ...]
    spans: tuple[tuple[int, int], ...] = Field((), exclude_if=lambda spans: not spans)

    @model_validator(mode="after")
    def _check_spans(self) -> Self:
        free = 0
        for first, span in self.spans:
            covered = self.layers[first + 1 : first + span]
            if first < free or span < 2 or len(covered) < span - 1 or {*covered} != {EMPTY_BLOCK}:
                raise ValueError(
                    f"a block cannot replace {span} layers from layer {first} here: the others must be empty"
                )
            free = first + span
        return self

    @classmethod
    def of_parent(cls, shape: "ModelShape") -> Self:
        """The parent's architecture."""
        return cls(layers=tuple(map(shape.parent_block, range(shape.layers))))

    @property
    def of_child(self) -> Self:
        """This architecture as a child's checkpoint has it: without the layers that spans cover."""
        return type(self)(layers=tuple(option.block for option in self.options.values()))

    @classmethod
    def of_options(cls, options: Iterable[Option]) -> Self:
        """The architecture with these options in their order."""
        layers, spans = list[BlockVariant](), list[tuple[int, int]]()
        for option in options:
            if option.span > 1:
                spans.append((len(layers), option.span))
            layers += [option.block, *[EMPTY_BLOCK] * (option.span - 1)]
        return cls(layers=tuple(layers), spans=tuple(spans))

    @classmethod
    def parse(cls, options: "list[str] | tuple[str, ...]") -> Self:
        """The architecture with these option ids in their order."""
        return cls.of_options(map(Option.parse, options))

    @property
    def options(self) -> dict[int, Option]:
        """The option of every layer that a child has, by the first of the layers that it replaces."""
        spans = dict(self.spans)
        covered = {layer for first, span in self.spans for layer in range(first + 1, first + span)}
        return {n: Option(block, spans.get(n, 1)) for n, block in enumerate(self.layers) if n not in covered}

    def replace(self, layer: int, block: BlockVariant) -> Self:
        """This architecture with one layer changed."""
        return type(self)(layers=(*self.layers[:layer], block, *self.layers[layer + 1 :]), spans=self.spans)


class ModelShape(Record):
    """The properties of a parent that determine the shapes of its tensors.

    Where layers differ, `kv_heads` and `ffn_width` are those of the largest layers, and `blocks` has every layer's own.
    """

    family: str = Field(description="Hugging Face model_type")
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocabulary: int
    tied_embeddings: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    # What follows leaves the keys of works alone at the values of a Llama.
    qk_norm_whole: bool = Field(
        False, description="Queries and keys are normalised over all heads together", exclude_if=lambda whole: not whole
    )
    gated: bool = Field(True, description="FFNs have a gate", exclude_if=lambda gated: gated)
    norms: int = Field(1, description="Norms of each subblock", exclude_if=lambda norms: norms == 1)
    windows: tuple[int, ...] = Field(
        (),
        description="The sliding window of every layer in tokens, 0 where a layer sees all; empty where all layers do",
        exclude_if=lambda windows: not windows,
    )
    blocks: tuple[BlockVariant, ...] = Field(
        (),
        description="The parent's own block of every layer, where these differ",
        exclude_if=lambda blocks: not blocks,
    )

    @property
    def largest_block(self) -> BlockVariant:
        """The block of the most KV heads and the widest FFN: that of every layer where these are alike."""
        return BlockVariant(
            attention=Variant("attn", "sized", self.kv_heads), ffn=Variant("ffn", "sized", self.ffn_width)
        )

    def window(self, layer: int) -> int:
        """The parent's own window of a layer in tokens; 0 where it sees all."""
        return self.windows[layer] if self.windows else 0

    def in_layer(self, layer: int, variant: Variant) -> Variant:
        """The variant as it runs in this layer: within the layer's own window where that is the shorter one."""
        return in_window(variant, own) if (own := self.window(layer)) else variant

    def parent_block(self, layer: int) -> BlockVariant:
        """The parent's own block variant of a layer."""
        return self.blocks[layer] if self.blocks else self.largest_block

    def with_blocks(self, blocks: tuple[BlockVariant, ...]) -> Self:
        """This shape with these blocks as the parent's own."""
        alike = self._of_size(blocks)
        return alike if set(blocks) == {alike.largest_block} else alike.model_copy(update={"blocks": blocks})

    def of_layer(self, layer: int) -> Self:
        """This shape with the sizes of one layer; what that layer lacks has the size that the largest layers have."""
        return self._of_size(self.blocks[layer : layer + 1]) if self.blocks else self

    def _of_size(self, blocks: tuple[BlockVariant, ...]) -> Self:
        sizes = {
            "kv_heads": max(block.attention.kv_heads for block in blocks) or self.kv_heads,
            "ffn_width": max(block.ffn.ffn_width for block in blocks) or self.ffn_width,
        }
        return self.model_copy(update=sizes | {"blocks": ()})

    def check(self, variant: Variant) -> Variant:
        """Return the variant if a layer of this parent's sizes can have it.

        Raises:
            SpecError: the KV heads do not divide the parent's, the FFN is wider than the parent's, or the window is as
                long as the parent's context.
        """
        if problem := variant.row.problem(self, variant.size):
            raise SpecError(f"variant {variant} {problem}")
        if variant.window >= self.max_positions:
            raise SpecError(
                f"variant {variant} is the full attention: the parent's context holds {self.max_positions} tokens"
            )
        return variant
