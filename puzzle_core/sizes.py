"""Exact costs from shapes: parameters and KV-cache bytes (METHOD section 5). No torch."""

from typing import NamedTuple

from puzzle_core.architecture import Architecture, ModelShape, Variant

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
    """Parameters and KV-cache entries per token of one subblock variant."""

    parameters: int
    kv_entries_per_token: int


def variant_size(shape: ModelShape, variant: Variant) -> VariantSize:
    """Parameters (norms and biases included) and KV entries per token of one subblock variant."""
    row, size = variant.row, variant.size
    parameters = row.parameters(shape, size) + row.keeps_norm * shape.norms * shape.hidden
    return VariantSize(parameters, row.kv_entries(shape, size))


def outside_parameters(shape: ModelShape) -> int:
    """Parameters outside the blocks: embedding, head (counted once if they are tied), final norm."""
    embeddings = 1 if shape.tied_embeddings else 2
    return embeddings * shape.vocabulary * shape.hidden + shape.hidden


def architecture_parameters(shape: ModelShape, architecture: Architecture) -> int:
    """Parameters of a whole child."""
    variants = (variant for block in architecture.layers for variant in block.subblocks)
    return outside_parameters(shape) + sum(variant_size(shape, variant).parameters for variant in variants)


def kv_entries_per_token(shape: ModelShape, architecture: Architecture) -> int:
    """KV-cache entries per token of a whole child."""
    return sum(variant_size(shape, block.attention).kv_entries_per_token for block in architecture.layers)


def kv_copies(kv_heads: int, tensor_parallel: int) -> float:
    """Copies of an attention's cache that its devices hold together: a whole head each where KV heads are fewer."""
    return max(1.0, tensor_parallel / kv_heads) if kv_heads else 1.0


def watched_windows(windows: int, checks: int) -> int:
    """Number of windows that GKD does not train on, and measures its KL on; none without checks."""
    return min(MOST_WATCHED, max(1, windows // WATCHED_PART)) if windows > 1 and checks else 0


def held_back_windows(windows: int) -> int:
    """Number of windows that BLD does not train on, and compares the start and the end of a training on."""
    return max(1, windows // HELD_BACK_PART) if windows > 1 else 0
