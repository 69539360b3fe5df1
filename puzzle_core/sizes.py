"""Exact costs from shapes alone: parameters and KV-cache bytes (METHOD section 5). No torch."""

from typing import NamedTuple

from puzzle_core.architecture import Architecture, ModelShape, Variant

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class VariantSize(NamedTuple):
    """What one subblock variant takes: parameters, and KV-cache entries per token."""

    parameters: int
    kv_entries_per_token: int


def variant_size(shape: ModelShape, variant: Variant) -> VariantSize:
    """Parameters (norm and biases included) and KV entries per token of one subblock variant."""
    if variant.kind == "no_op":
        return VariantSize(0, 0)
    width = shape.hidden
    if variant.kind == "linear":
        bias = shape.qkv_bias or shape.attention_out_bias if variant.subblock == "attn" else shape.mlp_bias
        return VariantSize(width + width * width + bias * width, 0)
    if variant.subblock == "ffn":
        biases = shape.mlp_bias * (2 * variant.size + width)
        return VariantSize(width + 3 * width * variant.size + biases, 0)
    query, key_value = shape.heads * shape.head_dim, variant.size * shape.head_dim
    weights = 2 * width * query + 2 * width * key_value
    biases = shape.qkv_bias * (query + 2 * key_value) + shape.attention_out_bias * width
    return VariantSize(width + weights + biases + shape.qk_norm * 2 * shape.head_dim, 2 * key_value)


def outside_parameters(shape: ModelShape) -> int:
    """Parameters outside the blocks: embedding, head (once where they are tied), final norm."""
    embeddings = 1 if shape.tied_embeddings else 2
    return embeddings * shape.vocabulary * shape.hidden + shape.hidden


def architecture_parameters(shape: ModelShape, architecture: Architecture) -> int:
    """Parameters of a whole child."""
    halves = (half for block in architecture.layers for half in (block.attention, block.ffn))
    return outside_parameters(shape) + sum(variant_size(shape, half).parameters for half in halves)


def kv_entries_per_token(shape: ModelShape, architecture: Architecture) -> int:
    """KV-cache entries per token of a whole child."""
    return sum(variant_size(shape, block.attention).kv_entries_per_token for block in architecture.layers)
