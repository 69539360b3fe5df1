"""Exact costs: the parameters and bytes of real models, and of the published 49B child."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from puzzle_core.architecture import Architecture, ModelShape, Variant
from puzzle_core.cost.analytic import (
    DTYPE_BYTES,
    architecture_parameters,
    kv_entries_per_token,
    outside_parameters,
    variant_size,
)
from puzzle_core.model.checkpoint import Checkpoint
from tests.pico import PICOS

PUBLISHED = Path(__file__).parents[4] / "shared/data/nemotron49b_config.json"
BIASED = ["llama", "qwen2", "qwen3", "attention-bias", "mlp-bias", "wide-heads", "tied"]
VARIANTS = ["attn:kv4", "attn:kv2", "attn:kv1", "attn:linear", "ffn:i48", "ffn:i20", "ffn:linear"]


@pytest.mark.parametrize("name", PICOS)
def test_the_parents_blocks_and_what_lies_outside_are_all_its_parameters(name, parent_of, checkpoint_of):
    shape = parent_of(name).shape
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of(name))
    assert architecture_parameters(shape, Architecture.of_parent(shape)) == model.num_parameters()


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_a_variant_are_those_of_its_tensors(name, variant, parent_of, initial_state):
    tensors = initial_state(name, 1, variant).values()
    expected = sum(tensor.numel() for tensor in tensors)
    assert variant_size(parent_of(name).shape, Variant.parse(variant)).parameters == expected


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_are_those_of_the_files_of_an_assembled_child(dtype, assemble, parent):
    blocks = (*(f"{variant}+ffn:no_op" for variant in VARIANTS[:3]), "attn:linear+ffn:i20", "attn:no_op+ffn:linear")
    (file,) = Checkpoint(assemble("llama", blocks, dtype)).files
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


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is not here")
def test_the_published_child_has_the_published_size():
    config = json.loads(PUBLISHED.read_text())
    shape = ModelShape(
        family="llama",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=8,
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        ffn_width=28672,
        vocabulary=config["vocab_size"],
        tied_embeddings=config["tie_word_embeddings"],
        qkv_bias=config["attention_bias"],
        attention_out_bias=config["attention_bias"],
        mlp_bias=config["mlp_bias"],
        qk_norm=False,
        max_positions=config["max_position_embeddings"],
    )
    child = Architecture.parse([published_block(shape, block) for block in config["block_configs"]])
    assert round(architecture_parameters(shape, child) / 1e9, 2) == 49.87
    assert kv_entries_per_token(shape, child) == 49 * 2 * 8 * 128
    assert round(architecture_parameters(shape, Architecture.of_parent(shape)) / 1e9, 2) == 70.55
    assert outside_parameters(shape) == 2 * 128256 * 8192 + 8192


def published_block(shape, block):
    """METHOD section 9."""
    attention, ffn = block["attention"], block["ffn"]
    heads = "no_op" if attention["no_op"] else f"kv{shape.heads // attention['n_heads_in_group']}"
    width = -(-int(2 * ffn["ffn_mult"] * shape.hidden / 3) // 256) * 256
    return f"attn:{heads}+ffn:i{width}"
