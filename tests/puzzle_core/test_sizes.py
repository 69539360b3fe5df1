"""Exact costs: the parameters and bytes of real models."""

import math

import pytest

from puzzle_core.architecture import Architecture, Variant
from puzzle_core.errors import ArtifactError
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.sizes import (
    DTYPE_BYTES,
    architecture_parameters,
    variant_size,
)
from tests.pico import PICOS

SIZED = [
    "llama",
    "qwen2",
    "qwen3",
    "attention-bias",
    "mlp-bias",
    "wide-heads",
    "tied",
    "arcee",
    "glm4",
    "olmo2",
    "phi3",
]
VARIANTS = ["attn:kv4", "attn:kv2", "attn:kv1", "attn:linear", "ffn:i48", "ffn:i20", "ffn:linear"]


@pytest.mark.parametrize("name", PICOS)
def test_the_parents_blocks_and_what_lies_outside_are_all_its_parameters(name, parent_of):
    shape, saved = parent_of(name).shape, parent_of(name).checkpoint.headers.values()
    entries = sum(math.prod(header.shape) for header in saved)
    assert architecture_parameters(shape, Architecture.of_parent(shape)) == entries


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_a_variant_are_those_of_its_tensors(name, variant, parent_of, initial_state):
    tensors = initial_state(name, 1, variant).values()
    expected = sum(tensor.numel() for tensor in tensors)
    assert variant_size(parent_of(name).shape, Variant.parse(variant)).parameters == expected


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_are_those_of_the_files_of_an_assembled_child(dtype, assemble, parent):
    blocks = (*(f"{variant}+ffn:no_op" for variant in VARIANTS[:3]), "attn:linear+ffn:i20", "attn:no_op+ffn:linear")
    (file,) = Checkpoint(assemble("llama", blocks, dtype), ArtifactError).files
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    parameters = architecture_parameters(parent.shape, Architecture.parse(blocks))
    assert file.stat().st_size - header_bytes == parameters * DTYPE_BYTES[dtype]


def test_costs_grow_with_width_and_kv_heads(parent):
    widths = [variant_size(parent.shape, Variant("ffn", "sized", width)).parameters for width in range(1, 49)]
    heads = [variant_size(parent.shape, Variant("attn", "sized", heads)) for heads in (1, 2, 4)]
    assert sorted(set(widths)) == widths
    assert sorted(set(heads)) == heads
    assert [size.kv_entries_per_token for size in heads] == [2 * 4, 4 * 4, 8 * 4]


def test_no_op_costs_nothing_and_linear_keeps_no_cache(parent):
    for subblock in ("attn", "ffn"):
        assert variant_size(parent.shape, Variant(subblock, "no_op")) == (0, 0)
        assert variant_size(parent.shape, Variant(subblock, "linear")).kv_entries_per_token == 0
