"""Exact costs from shapes: parameters and KV-cache bytes (METHOD section 5). No torch."""

import math
from typing import NamedTuple

from puzzle_core.architecture import Architecture, ModelShape, Variant
from puzzle_core.errors import SpecError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
LARGEST_LOG_PROBABILITIES_BYTES = 2**30
"""The scratch disk keeps the parent's log-probabilities up to this size; larger ones are computed again."""
LAYER_CACHE_BYTES = 4 * 2**30
"""A process keeps the parent's layers in memory up to this size, on all of its devices together."""
HELD_BACK_PART = 32
"""BLD holds back one window in this many."""
WATCHED_PART, MOST_WATCHED = 64, 32
"""GKD holds back one window in this many, and at most this many: its watching stays cheap."""


class VariantSize(NamedTuple):
    """Parameters of one subblock variant, and KV-cache entries per token that it sees."""

    parameters: int
    kv_entries_per_token: int


def variant_size(shape: ModelShape, variant: Variant) -> VariantSize:
    """Parameters (norms and biases included) and KV entries per token of one subblock variant."""
    row, size = variant.row, variant.size
    parameters = row.parameters(shape, size) + row.keeps_norm * shape.norms * shape.hidden
    return VariantSize(parameters, row.kv_entries(shape, size))


def is_cheaper(shape: ModelShape, variant: Variant, own: Variant) -> bool:
    """Whether a variant can take the place of a parent's own to save something: parameters or KV entries."""
    if variant.rank <= own.rank or variant.kv_heads > own.kv_heads or variant.ffn_width > own.ffn_width:
        return False
    if own.window and variant.kv_heads and not 0 < variant.window <= own.window:
        return False
    size, own_size = variant_size(shape, variant), variant_size(shape, own)
    fewer_entries = size.kv_entries_per_token < own_size.kv_entries_per_token
    return fewer_entries or size.parameters <= own_size.parameters


def outside_parameters(shape: ModelShape) -> int:
    """Parameters outside the blocks: embedding, head (counted once if they are tied), final norm."""
    embeddings = 1 if shape.tied_embeddings else 2
    return embeddings * shape.vocabulary * shape.hidden + shape.hidden


def architecture_parameters(shape: ModelShape, architecture: Architecture) -> int:
    """Parameters of a whole child."""
    variants = (variant for block in architecture.layers for variant in block.subblocks)
    return outside_parameters(shape) + sum(variant_size(shape, variant).parameters for variant in variants)


def parameter_bytes(
    shape: ModelShape, architecture: Architecture, weight_bytes: float, embedding_bytes: float | None = None
) -> float:
    """Bytes of all weights of a child; embedding, head and final norm have their own bytes per weight, if given."""
    outside = outside_parameters(shape)
    blocks = architecture_parameters(shape, architecture) - outside
    return blocks * weight_bytes + outside * (embedding_bytes or weight_bytes)


def kv_entries(shape: ModelShape, architecture: Architecture, tokens: int, tensor_parallel: int = 1) -> float:
    """KV-cache entries of a whole child for one sequence of so many tokens, on all devices that share its layers.

    A window caps its layer's part; devices that outnumber KV heads hold copies.
    """
    attentions = (shape.in_layer(layer, block.attention) for layer, block in enumerate(architecture.layers))
    return sum(
        a.seen(tokens) * variant_size(shape, a).kv_entries_per_token * kv_copies(a.kv_heads, tensor_parallel)
        for a in attentions
    )


def kv_copies(kv_heads: int, tensor_parallel: int) -> float:
    """Copies of an attention's cache that its devices hold together: a whole head each where KV heads are fewer."""
    return max(1, tensor_parallel / kv_heads) if kv_heads else 1


def check_devices(shape: ModelShape, tensor_parallel: int, pipeline_parallel: int = 1) -> None:
    """Refuse a number of devices that cannot share the model.

    Raises:
        SpecError: query heads or FFN width are no multiple of `tensor_parallel`, or stages are more than layers.
    """
    for what, count in (("heads", shape.heads), ("FFN channels", shape.ffn_width)):
        if count % tensor_parallel:
            raise SpecError(
                f"tensor_parallel is {tensor_parallel}, and the model has {count} {what}, which so many devices cannot "
                f"share: take a divisor of {math.gcd(shape.heads, shape.ffn_width)}"
            )
    if pipeline_parallel > shape.layers:
        raise SpecError(f"pipeline_parallel is {pipeline_parallel}, and the model has {shape.layers} layers")


def watched_windows(windows: int, checks: int) -> int:
    """Number of windows that GKD does not train on, and measures its KL on; none without checks."""
    return min(MOST_WATCHED, max(1, windows // WATCHED_PART)) if windows > 1 and checks else 0


def held_back_windows(windows: int) -> int:
    """Number of windows that BLD does not train on, and compares the start and the end of a training on."""
    return max(1, windows // HELD_BACK_PART) if windows > 1 else 0
