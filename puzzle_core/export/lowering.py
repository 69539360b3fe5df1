"""Repacks an architecture into layers that llama.cpp's `deci` graph computes correctly (source: src/models/deci.cpp).

A `deci` layer has two slots on the residual stream: the first takes an attention, a linear layer, or nothing; the
second takes a gated FFN. The graph is wrong where a layer has no FFN (it ignores the layer's attention, and aborts in
the last layer) and where the first layer has neither attention nor linear layer (it reads the head width there).
llama.cpp cannot make a cache where no layer attends. So the subblocks are packed into slots again, in their order:
linear FFNs go into first slots, empty layers disappear, and slots that must not be empty are filled with zeros, which
add nothing.
"""

from dataclasses import dataclass

from puzzle_core.architecture import Architecture, ModelShape, Variant

ZERO_WIDTH = 32
"""Width of an FFN of zeros: one block of llama.cpp's quantised types."""


@dataclass(frozen=True)
class PlacedSubblock:
    """The content of a slot: a subblock of a layer of the child, or zeros where `layer` is none."""

    layer: int | None
    variant: Variant


ZERO_ATTENTION = PlacedSubblock(None, Variant("attn", "sized", 1))
ZERO_LINEAR = PlacedSubblock(None, Variant("attn", "linear"))
ZERO_FFN = PlacedSubblock(None, Variant("ffn", "sized", ZERO_WIDTH))


@dataclass(frozen=True)
class LoweredLayer:
    """One `deci` layer; `attention` may hold a linear FFN."""

    attention: PlacedSubblock | None
    ffn: PlacedSubblock


def lower(architecture: Architecture, shape: ModelShape) -> list[LoweredLayer]:
    """The layers to write, in order, at least one."""
    slots: list[tuple[PlacedSubblock | None, PlacedSubblock | None]] = []
    for subblock in _subblocks(architecture):
        takes_second = subblock.variant.ffn_width > 0
        open_layer = bool(slots) and slots[-1][1] is None and not biased(slots[-1][0], shape)
        if takes_second and open_layer:
            slots[-1] = (slots[-1][0], subblock)
        else:
            slots.append((None, subblock) if takes_second else (subblock, None))
    attends = any(block.attention.kv_heads for block in architecture.layers)
    if not slots or (slots[0][0] and not attends):
        slots.insert(0, (None, None))
    if slots[0][0] is None:
        slots[0] = (ZERO_LINEAR if attends else ZERO_ATTENTION, slots[0][1])
    return [LoweredLayer(attention, ffn or ZERO_FFN) for attention, ffn in slots]


def biased(subblock: PlacedSubblock | None, shape: ModelShape) -> bool:
    """Whether this is a linear layer with a bias, which only an FFN of zeros behind it can hold (as its own bias)."""
    if subblock is None or subblock.layer is None or subblock.variant.row.linear_bias is None:
        return False
    return subblock.variant.row.linear_bias(shape)


def _subblocks(architecture: Architecture) -> list[PlacedSubblock]:
    """All subblocks that add to the residual stream, in order."""
    pairs = [(n, v) for n, block in enumerate(architecture.layers) for v in (block.attention, block.ffn)]
    return [PlacedSubblock(layer, variant) for layer, variant in pairs if not variant.is_empty]
