"""The shape of a parent, the variants of its subblocks, and architectures made of them (METHOD section 1).

A layer has two subblocks, attention and FFN. A variant is one alternative for a subblock and has an id:

    attn:kv4  attn:linear  attn:no_op        grouped-query attention with 4 KV heads, one linear layer, nothing
    ffn:i8704 ffn:linear   ffn:no_op         gated FFN of intermediate width 8704, one linear layer, nothing

A block variant is a pair of them (`attn:kv4+ffn:i8704`), an architecture one block variant per layer.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from puzzle_core.errors import SpecError
from puzzle_core.records import Record

Subblock = Literal["attn", "ffn"]
Kind = Literal["sized", "linear", "no_op"]
_ID = re.compile(r"(attn|ffn):(linear|no_op|(?:kv|i)(\d+))")


@dataclass(frozen=True, order=True)
class Variant:
    """One alternative for a subblock; `size` is the number of KV heads or the intermediate width."""

    subblock: Subblock
    kind: Kind
    size: int = 0

    @classmethod
    def parse(cls, value: "str | Variant") -> "Variant":
        """The variant with this id.

        Raises:
            ValueError: no variant has this id.
        """
        if isinstance(value, Variant):
            return value
        match = _ID.fullmatch(value)
        subblock, kind, size = match.groups() if match else ("", "", None)
        prefix = "kv" if subblock == "attn" else "i"
        if not match or (size is not None and (not kind.startswith(prefix) or int(size) == 0)):
            raise ValueError(f"{value!r} is no variant id: say attn:kv4, attn:linear, attn:no_op, ffn:i512 and so on")
        return cls(subblock, "sized", int(size)) if size else cls(subblock, kind)  # type: ignore[arg-type]

    def __str__(self) -> str:
        size = f"{'kv' if self.subblock == 'attn' else 'i'}{self.size}"
        return f"{self.subblock}:{size if self.kind == 'sized' else self.kind}"


VariantId = Annotated[
    Variant,
    BeforeValidator(Variant.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _ID.pattern}),
]


class BlockVariant(Record):
    """An attention variant and an FFN variant: what one layer of a child is made of."""

    attention: VariantId
    ffn: VariantId

    @model_validator(mode="after")
    def _halves_in_their_places(self) -> Self:
        if (self.attention.subblock, self.ffn.subblock) != ("attn", "ffn"):
            raise ValueError(f"{str(self)!r} is no block variant: say attn:kv4+ffn:i512 and so on")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """The block variant with this id, for instance `attn:kv4+ffn:i512`."""
        attention, _, ffn = text.partition("+")
        return cls(attention=Variant.parse(attention), ffn=Variant.parse(ffn))

    def __str__(self) -> str:
        return f"{self.attention}+{self.ffn}"


EMPTY_BLOCK = BlockVariant(attention=Variant("attn", "no_op"), ffn=Variant("ffn", "no_op"))


class Architecture(Record):
    """One block variant per layer."""

    layers: tuple[BlockVariant, ...]

    @classmethod
    def of_parent(cls, shape: "ModelShape") -> Self:
        """The architecture that is the parent itself."""
        return cls(layers=(shape.parent_block,) * shape.layers)

    @classmethod
    def parse(cls, options: "list[str] | tuple[str, ...]") -> Self:
        """The architecture with these block variant ids, layer by layer."""
        return cls(layers=tuple(BlockVariant.parse(option) for option in options))

    def replace(self, layer: int, block: BlockVariant) -> Self:
        """This architecture with one layer changed."""
        return type(self)(layers=(*self.layers[:layer], block, *self.layers[layer + 1 :]))


class ModelShape(Record):
    """Everything about a parent that decides the shapes of its tensors, and nothing about their values."""

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

    @property
    def parent_block(self) -> BlockVariant:
        """The parent's own block variant, equal in every layer."""
        return BlockVariant(
            attention=Variant("attn", "sized", self.kv_heads), ffn=Variant("ffn", "sized", self.ffn_width)
        )

    def check(self, variant: Variant) -> Variant:
        """The variant itself, if this parent can have it.

        Raises:
            SpecError: the KV heads do not divide the parent's, or the FFN is wider than the parent's.
        """
        if variant.kind == "sized" and variant.subblock == "attn" and self.kv_heads % variant.size:
            divisors = [n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0]
            raise SpecError(
                f"variant {variant}: {variant.size} KV heads do not divide the parent's {self.kv_heads}; "
                f"use one of {divisors}"
            )
        if variant.kind == "sized" and variant.subblock == "ffn" and variant.size > self.ffn_width:
            raise SpecError(f"variant {variant} is wider than the parent's FFN ({self.ffn_width}): use a smaller width")
        return variant
