"""block_configs: a published child's file read and written back, every variant there and back, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.errors import SpecError
from puzzle_core.formats.block_configs import from_block_configs, to_block_configs
from puzzle_core.formats.decilm_config import architecture_of, decilm_child_config
from puzzle_core.variants.entries import ffn_mult_of, width_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "head_dim": 128,
    "rope_theta": 500000.0,
}
SMALL = LLAMA | {"hidden_size": 512, "num_attention_heads": 16, "num_hidden_layers": 5, "intermediate_size": 1536}
SMALL |= {"head_dim": 32}
BLOCKS = (
    "attn:kv8+ffn:i1536",
    "attn:kv2+ffn:i256",
    "attn:linear+ffn:no_op",
    "attn:no_op+ffn:linear",
    "attn:no_op+ffn:no_op",
)
PUBLISHED_KEYS = {"attention": {"n_heads_in_group", "no_op", "replace_with_linear"}}
PUBLISHED_KEYS |= {"ffn": {"ffn_mult", "no_op", "replace_with_linear"}}


@pytest.fixture
def published() -> dict[str, Any]:
    """The config.json of NVIDIA's 49B child, as published."""
    path = Path(__file__).parents[3].parent / "shared" / "data" / "nemotron49b_config.json"
    if not path.exists():
        pytest.skip("the folder shared/data is not beside this checkout")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def shape(**changes: Any) -> ModelShape:
    """A shape of LLAMA's kind, with changes."""
    sizes = {"layers": 5, "hidden": 512, "heads": 16, "kv_heads": 8, "head_dim": 32, "ffn_width": 1536} | changes
    flags = dict.fromkeys(("tied_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm"), False)
    return ModelShape(family="llama", vocabulary=1000, max_positions=1024, **sizes, **flags)


def test_a_published_child_is_read_and_written_back(published: dict[str, Any]) -> None:
    architecture = architecture_of(published, "the published file")
    assert len(architecture.layers) == 80
    assert {str(block.attention) for block in architecture.layers} == {"attn:kv8", "attn:no_op"}
    widths = {block.ffn.size for block in architecture.layers}
    assert widths == {2816, 5632, 7168, 14336, 17920, 28672}, "as the engines compute them"
    again = decilm_child_config(LLAMA, architecture)
    assert architecture_of(again, "written") == architecture
    for name in (
        "architectures",
        "model_type",
        "num_key_value_heads",
        "intermediate_size",
        "hidden_size",
        "rope_theta",
    ):
        assert again[name] == published[name]
    for ours, theirs in zip(again["block_configs"], published["block_configs"], strict=True):
        assert ours["attention"].items() <= theirs["attention"].items()
        if theirs["ffn"]["ffn_mult"] not in (0.5, 1.0):  # these two name widths between two multiples of 256
            assert ours["ffn"].items() <= theirs["ffn"].items()


def test_every_variant_goes_there_and_back() -> None:
    architecture = Architecture.parse(BLOCKS)
    entries = to_block_configs(architecture, shape())
    assert from_block_configs(json.loads(json.dumps(entries)), hidden=512, heads=16) == architecture
    assert all({half: set(entry[half]) for half in entry} == PUBLISHED_KEYS for entry in entries)
    assert [entry["attention"]["n_heads_in_group"] for entry in entries] == [2, 8, None, None, None]
    kept = [entry["ffn"]["ffn_mult"] for entry in entries[:2]]
    assert all(isinstance(ffn_mult, float) for ffn_mult in kept), "engines insist on floats in JSON"
    assert [entries[n]["ffn"]["replace_with_linear"] for n in range(5)] == [False, False, False, True, False]


@pytest.mark.parametrize("hidden", [100, 512, 576, 960, 2055, 4096, 8192, 16384])
def test_engines_compute_the_width_that_was_meant(hidden: int) -> None:
    for width in range(256, 8 * hidden, 256):
        ffn_mult = ffn_mult_of(width, hidden)
        assert math.ceil(int(2 * ffn_mult * hidden / 3) / 256) * 256 == width
        assert width_of(round(ffn_mult, 6), hidden) == width, "some engines round to six decimals"


def test_sizes_may_be_said_outright() -> None:
    ours = {
        "attention": {"num_key_value_heads": 2, "no_op": False, "replace_with_linear": False},
        "ffn": {"intermediate_size": 300, "no_op": False, "weights_precision": "bf16", "moe": None},
        "parallel_blocks": None,
    }
    assert str(from_block_configs([ours], hidden=512, heads=16).layers[0]) == "attn:kv2+ffn:i300"


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        (
            "attn:kv8+ffn:i300",
            {},
            r"layer 1 attn:kv8\+ffn:i300: .* width 300 .* would take 512; .*ffn_multiple_of: 256",
        ),
        ("attn:kv3+ffn:i256", {}, r"layer 1 attn:kv3\+ffn:i256: .*3 KV heads do not divide the parent's 8"),
        ("attn:kv8+ffn:i256", {"layers": 6}, r"the architecture has 5 layers, and its parent 6"),
    ],
)
def test_what_the_form_cannot_carry_is_refused(block: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        to_block_configs(Architecture.parse((BLOCKS[0], block, *BLOCKS[2:])), shape(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "block_configs carry children of llama and mistral; this is 'qwen3'"),
        ({"head_dim": 64}, r"head_dim of 64: engines take hidden over heads, 512 / 16"),
        ({"sliding_window": 4096}, r"sliding_window is 4096"),
        ({"num_hidden_layers": None}, r"num_hidden_layers: .*\(found 'None'\)"),
    ],
)
def test_parents_that_the_form_cannot_carry_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        decilm_child_config(SMALL | changes, Architecture.parse(BLOCKS))


ATTENTION = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
FFN = {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False}


@pytest.mark.parametrize(
    ("attention", "ffn", "message"),
    [
        ({"n_heads_in_group": None}, {}, "layer 1, attention is kept, and neither num_key_value_heads nor n_heads_in"),
        ({"n_heads_in_group": 3}, {}, "layer 1, attention: n_heads_in_group 3 do not go with 16 query heads"),
        ({"num_key_value_heads": 2}, {}, "n_heads_in_group 2 and num_key_value_heads 2 do not go with 16"),
        ({"n_heads_in_group": None, "num_key_value_heads": 5}, {}, "num_key_value_heads 5 do not divide the 16"),
        ({"n_heads_in_group": True}, {}, "n_heads_in_group is True; it must be a whole number above 0"),
        ({"no_op": True, "replace_with_linear": True}, {}, "no_op and replace_with_linear are both true"),
        ({"no_op": None}, {}, "no_op is None; use true or false"),
        ({"window_length": 4096}, {}, "layer 1, attention: window_length is 4096, and no variant here has that"),
        ({}, {"ffn_mult": None}, "layer 1, ffn is kept, and neither intermediate_size nor ffn_mult says its width"),
        ({}, {"ffn_mult": -1.0}, "layer 1, ffn: ffn_mult is -1.0; it must be a number above 0"),
        ({}, {"ffn_mult": math.nan}, "ffn_mult is nan; it must be a number above 0"),
        ({}, {"moe": {"num_local_experts": 8}}, "layer 1, ffn: moe is .* leave such blocks out"),
        ({}, {"weights_precision": "fp8"}, "weights_precision is 'fp8'"),
    ],
)
def test_damaged_block_configs_are_named(attention: dict[str, Any], ffn: dict[str, Any], message: str) -> None:
    entries = [{"attention": ATTENTION, "ffn": FFN}, {"attention": ATTENTION | attention, "ffn": FFN | ffn}]
    with pytest.raises(SpecError, match=message):
        from_block_configs(entries, hidden=512, heads=16)


@pytest.mark.parametrize("entries", [[], "block_configs", None, [None], [{"attention": ATTENTION}], [{"ffn": FFN}]])
def test_what_is_no_list_of_blocks_is_refused(entries: Any) -> None:
    with pytest.raises(SpecError, match=r"block_configs must be a list|layer 0 (must be|has no (attention|ffn))"):
        from_block_configs(entries, hidden=512, heads=16)
