"""Any architecture as layers that llama.cpp's `deci` graph computes right (its source: src/models/deci.cpp).

A `deci` layer is two slots on the residual stream: first an attention, a linear layer, or nothing; then a gated FFN.
The graph goes wrong where a layer has no FFN (it forgets the layer's attention, and aborts in the last layer) and where
the first one has neither attention nor linear layer (it takes the head width from there), and the cache cannot be made
where no layer attends. So subblocks are taken in their order and packed into slots anew: linear FFNs go where
attentions go, empty layers vanish, and what cannot stay empty is filled with zeros, which add nothing.
"""

from dataclasses import dataclass

from puzzle_core.architecture import Architecture, ModelShape, Variant

ZERO_WIDTH = 32
"""Width of an FFN of zeros: one block of llama.cpp's quantised types."""


@dataclass(frozen=True)
class Half:
    """What fills a slot: a subblock of a layer of the child, or zeros where `layer` is none."""

    layer: int | None
    variant: Variant


ZERO_ATTENTION = Half(None, Variant("attn", "sized", 1))
ZERO_LINEAR = Half(None, Variant("attn", "linear"))
ZERO_FFN = Half(None, Variant("ffn", "sized", ZERO_WIDTH))


@dataclass(frozen=True)
class LoweredLayer:
    """One `deci` layer; `attention` may hold a linear FFN."""

    attention: Half | None
    ffn: Half


def lower(architecture: Architecture, shape: ModelShape) -> list[LoweredLayer]:
    """The layers to write, in order, at least one."""
    slots: list[tuple[Half | None, Half | None]] = []
    for half in _halves(architecture):
        takes_second = half.variant.ffn_width > 0
        open_layer = bool(slots) and slots[-1][1] is None and not biased(slots[-1][0], shape)
        if takes_second and open_layer:
            slots[-1] = (slots[-1][0], half)
        else:
            slots.append((None, half) if takes_second else (half, None))
    attends = any(block.attention.kv_heads for block in architecture.layers)
    if not slots or (slots[0][0] and not attends):
        slots.insert(0, (None, None))
    if slots[0][0] is None:
        slots[0] = (ZERO_LINEAR if attends else ZERO_ATTENTION, slots[0][1])
    return [LoweredLayer(attention, ffn or ZERO_FFN) for attention, ffn in slots]


def biased(half: Half | None, shape: ModelShape) -> bool:
    """Whether it is a linear layer with a bias, which only an FFN of zeros behind it can carry (as its own bias)."""
    if half is None or half.layer is None or half.variant.row.linear_bias is None:
        return False
    return half.variant.row.linear_bias(shape)


def _halves(architecture: Architecture) -> list[Half]:
    """Everything that adds to the residual stream, in order."""
    pairs = [(n, v) for n, block in enumerate(architecture.layers) for v in (block.attention, block.ffn)]
    return [Half(layer, variant) for layer, variant in pairs if not variant.is_empty]
