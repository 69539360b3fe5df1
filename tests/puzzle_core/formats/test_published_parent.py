"""A published DeciLM (Nemotron-NAS) configuration as a parent: plan, costs, search and export need no weights."""

import json
from pathlib import Path

import pytest

from puzzle_core.architecture import Architecture
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import ParentError
from puzzle_core.formats.decilm_config import architecture_of, decilm_child_config
from puzzle_core.model.parent_config import read_config, shape_of
from puzzle_core.plan import Inputs, Plan
from puzzle_core.resources import resources
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, score_table
from puzzle_core.search.run_search import find_architecture
from puzzle_core.sizes import architecture_parameters, is_cheaper, variant_size
from puzzle_core.spec import parse_spec
from puzzle_core.work import ScoreRecord
from puzzle_core.yaml_file import read_keys

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT.parent / "shared" / "data" / "nemotron49b_config.json"
NO_ATTENTION = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False, "window_length": None}
LINEAR = {"ffn_mult": None, "no_op": False, "replace_with_linear": True, "sparsify": None}


def attention(group):
    return {"n_heads_in_group": group, "no_op": False, "replace_with_linear": False, "window_length": None}


def ffn(mult):
    return {"ffn_mult": mult, "no_op": False, "replace_with_linear": False, "sparsify": None}


SMALL = {
    "architectures": ["DeciLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    "model_type": "nemotron-nas",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": None,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 1000,
    "block_configs": [
        {"attention": attention(2), "ffn": ffn(2.625)},
        {"attention": NO_ATTENTION, "ffn": ffn(5.25)},
        {"attention": attention(4), "ffn": ffn(1.0)},
        {"attention": attention(8), "ffn": LINEAR},
        {"attention": NO_ATTENTION, "ffn": ffn(0.5)},
    ],
}
SPEC = {
    "parent": {"path": "p"},
    "data": {"sequence_length": 64},
    "variants": {"kv_heads": [4, 2, 1], "ffn_ratios": [0.5, 0.25], "ffn_multiple_of": 256},
    "target": read_keys(ROOT / "deployments" / "targets" / "h100-80gb-bf16.yaml", "target", ""),
    "scoring": {"composition": "subblocks"},
    "search": {"baselines": ["greedy", "uniform"], "frontier_points": 2, "explain": False},
    "scenario": {
        "prompt_tokens": 512,
        "generated_tokens": 128,
        "batch_sizes": [16],
        "limits": {"block_time": "85%", "parameters": "95%"},
    },
}


def plan_of(content, place):
    """The plan of a parent of which there is only the configuration."""
    (place / "config.json").write_text(json.dumps(content))
    config, blocks = read_config(place)
    shape = shape_of(config, place, blocks)
    inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
    return Plan(parse_spec(SPEC, "test"), Inputs(shape=shape, **inputs))


def searched(plan):
    """The answer over costs from a data sheet, where a lost parameter costs more in early layers."""
    shape, works = plan.inputs.shape, plan.costs()

    def size(block):
        return sum(variant_size(shape, variant).parameters for variant in block.subblocks)

    def score(layer, block):
        kl = (size(shape.parent_block(layer)) - size(block)) / size(shape.largest_block) * (2 - layer / shape.layers)
        return ScoreRecord(layer=layer, block=block, kl_nats_per_token=kl, tokens=1)

    scores = [score(work.layer, work.block) for work in plan.all_scores()]
    costs = {place: roofline(shape, work.variants, work.traffic, work.target) for place, work in works.items()}
    builder = ProblemBuilder(
        plan.spec.request,
        score_table(scores, plan.spec.scoring.composition, "kl", plan.variants, shape),
        cost_table(plan.variants, shape, costs),
    )
    return find_architecture(builder)


def check_search_and_export(content, place):
    """Plan, costs, search and the child's configuration; returns the plan and the child's architecture."""
    plan = plan_of(content, place)
    shape, record = plan.inputs.shape, searched(plan)
    own, child = Architecture.of_parent(shape), record.best.architecture
    for layer, block in enumerate(child.layers):
        pairs = zip(block.subblocks, own.layers[layer].subblocks, strict=True)
        assert all(a == b or is_cheaper(shape.of_layer(layer), a, b) for a, b in pairs)
    assert child != own
    assert architecture_parameters(shape, child) <= 0.95 * architecture_parameters(shape, own)
    assert all(use.usage <= use.threshold * 1.000001 for use in record.best.limits)
    written = decilm_child_config(content, child)
    assert architecture_of(written, "the child") == child
    assert {key: written[key] for key in content if key != "block_configs"} == {
        key: value for key, value in content.items() if key != "block_configs"
    }
    kept = {"n_heads_in_group", "ffn_mult", "no_op", "replace_with_linear"}
    same = decilm_child_config(content, own)["block_configs"]
    assert architecture_of(content, "the parent") == own
    assert [[{*entry["attention"], *entry["ffn"]} for entry in same]] == [[kept] * shape.layers]
    assert resources(plan).gkd_flops > 0
    return plan, child


def test_a_published_configuration_is_planned_costed_searched_and_exported(tmp_path):
    plan, _ = check_search_and_export(SMALL, tmp_path)
    own = ["attn:kv4+ffn:i1024", "attn:no_op+ffn:i1792", "attn:kv2+ffn:i512", "attn:kv1+ffn:linear"]
    assert list(map(str, plan.inputs.shape.blocks)) == [*own, "attn:no_op+ffn:i256"]
    assert [[str(v) for v in plan.trained(layer)] for layer in plan.layers] == [
        ["attn:kv2", "attn:kv1", "attn:linear", "ffn:i512", "ffn:i256", "ffn:linear"],
        ["ffn:i1024", "ffn:i512", "ffn:linear"],
        ["attn:kv1", "attn:linear", "ffn:i256", "ffn:linear"],
        ["attn:linear"],
        ["ffn:linear"],
    ]
    record = roofline(plan.inputs.shape, (), next(iter(plan.costs().values())).traffic, plan.target)
    table = searched(plan).parent.totals
    assert record.parent.prefill_ms == pytest.approx(table["prefill_ms"])
    assert record.parent.decode_ms == pytest.approx(table["decode_ms"])


def test_the_published_49b_configuration_is_planned_costed_searched_and_exported(tmp_path):
    if not PUBLISHED.exists():
        pytest.skip("the folder shared/data is not beside this checkout")
    plan, child = check_search_and_export(json.loads(PUBLISHED.read_text()), tmp_path)
    shape = plan.inputs.shape
    assert architecture_parameters(shape, Architecture.of_parent(shape)) == pytest.approx(49.9e9, rel=1e-3)
    assert sum(block.attention.is_empty for block in shape.blocks) == 31
    assert {block.ffn.ffn_width for block in shape.blocks} == {28672, 17920, 14336, 7168, 5632, 2816}
    assert sum(block.attention.kv_heads > 0 for block in child.layers) < 49


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_configs": SMALL["block_configs"][:4]}, "num_hidden_layers 5, and 4 entries"),
        ({"block_configs": None}, "block_configs"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (
            {"block_configs": [{"attention": attention(2) | {"window_length": 8192}, "ffn": ffn(1.0)}] * 5},
            "layer 0, attention: window_length is 8192",
        ),
        ({"qk_layernorm": True}, "qk_layernorm = True"),
    ],
)
def test_what_no_block_here_is_gets_refused_by_name(change, message, tmp_path):
    with pytest.raises(ParentError, match=message):
        plan_of(SMALL | change, tmp_path)
