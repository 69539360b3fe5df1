"""The registry of variant kinds: every row against real modules, and a kind that a test adds at run time.

CONTRIBUTING.md names the tests of the toy kind, at the end, as those to copy for a new kind.
"""

import ast
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from puzzle_core import scoring
from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.cost.roofline import roofline
from puzzle_core.distill import bld
from puzzle_core.engines import RESTRICTIONS
from puzzle_core.errors import ExportError, SpecError
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.formats.block_configs import block_config, from_block_configs, to_block_configs
from puzzle_core.model import child
from puzzle_core.model.surgery import WEIGHTS, load_weights, variant_block
from puzzle_core.plan import Inputs, Plan
from puzzle_core.resources import resources
from puzzle_core.search.from_tables import read_request, search_tables
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, score_table
from puzzle_core.search.run_search import find_architecture
from puzzle_core.sizes import variant_size
from puzzle_core.spec import ConstraintsSpec, VariantsSpec, parse_spec
from puzzle_core.variants.kinds import KINDS, VariantKind, kinds_of
from puzzle_core.work import AssembleWork, ScoreRecord
from tests.conftest import CPU

ROOT = Path(__file__).parents[3]
ROWS = list(KINDS.values())


def a_variant(row: VariantKind) -> Variant:
    """A variant of this kind that the plain parent can have."""
    return Variant(row.subblock, row.name, 2 if row.sized else 0, 8 if row.windowed else 0)


def row_id(row: VariantKind) -> str:
    return f"{row.subblock} {row.name}"


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_ids_round_trip(row):
    for size in (1, 8, 12288) if row.sized else (0,):
        variant = Variant(row.subblock, row.name, size, 1024 if row.windowed else 0)
        assert Variant.parse(str(variant)) == variant


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mlp-bias", "arcee", "gemma3_text", "olmo3", "phi3"])
@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_parameters_and_kv_entries_are_those_of_the_real_module(row, name, parent_of, initial_state, activations_of):
    parent, variant, activations = parent_of(name), a_variant(row), activations_of(name)
    state = initial_state(name, 1, str(variant))
    block = variant_block(parent, 1, variant, state, torch.float32, CPU)
    size, cache = variant_size(parent.shape, variant), DynamicCache()
    assert sum(parameter.numel() for parameter in block.parameters()) == size.parameters
    with torch.no_grad():
        block(activations.layer_input(1)[:1], **activations.contexts()[1] | {"past_key_values": cache})
    entries = sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values))
    assert entries == size.kv_entries_per_token * activations.ids_NT.shape[1]
    assert variant.is_empty == (size.parameters == 0)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_entries_are_read_back_and_have_the_keys_that_the_row_names(row, parent):
    shape, variant = parent.shape, a_variant(row)
    block = parent.shape.largest_block.with_variant(variant)
    assert from_block_configs([block_config(block)], shape.hidden, shape.heads).layers == (block,)
    (key,) = row.entry(variant.size)
    assert key in row.size_keys


@pytest.mark.parametrize("subblock", ["attn", "ffn"])
def test_what_tells_kinds_apart_is_given_once(subblock):
    rows = kinds_of(subblock)
    told = [(row.flag, row.windowed) for row in rows]
    for names in ([row.title for row in rows], told, [row.order for row in rows]):
        assert len(set(names)) == len(names)


def test_restrictions_and_fields_of_rows_are_there():
    restrictions = RESTRICTIONS.keys()
    assert {name for row in ROWS for name in row.restricted_by} <= restrictions
    assert {row.spec_field for row in ROWS} - {None} <= VariantsSpec.model_fields.keys()
    assert {row.constraint_field for row in ROWS} - {None} <= ConstraintsSpec.model_fields.keys()


def test_variants_of_a_layer_stand_from_the_parents_own_to_nothing(parent):
    spec = VariantsSpec(kv_heads=(1, 2), ffn_widths=(8, 16), ids=(Variant.parse("attn:kv2"), Variant.parse("ffn:i12")))
    attentions, ffns = spec.of_layer(0, parent.shape)
    assert list(map(str, attentions)) == ["attn:kv4", "attn:kv2", "attn:kv1", "attn:linear", "attn:no_op"]
    assert list(map(str, ffns)) == ["ffn:i48", "ffn:i16", "ffn:i12", "ffn:i8", "ffn:linear", "ffn:no_op"]


def test_ids_of_some_layers_stand_instead_of_those_of_all(parent):
    spec = VariantsSpec.model_validate(
        {"ids": ["attn:kv2"], "layers": [{"first_layer": 1, "last_layer": 1, "ids": ["attn:kv1"]}]}
    )
    offered = [[v.size for v in spec.of_layer(layer, parent.shape)[0] if v.size] for layer in (0, 1)]
    assert offered == [[4, 2], [4, 1]]
    assert "ids" not in VariantsSpec().model_dump(), "a spec without them keeps the keys of its works"


def switches(source: str) -> list[int]:
    """Lines that compare a variant's kind with something."""
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare | ast.Subscript)]
    names = {name for _, name in KINDS}
    return [
        node.lineno
        for node in compared
        if any(isinstance(inner, ast.Attribute) and inner.attr == "kind" for inner in ast.walk(node))
        and any(isinstance(inner, ast.Constant) and inner.value in names for inner in ast.walk(node))
    ]


def test_nothing_asks_a_variant_for_its_kind_by_name():
    files = [file for package in ("puzzle_core", "tasks", "flows") for file in (ROOT / package).rglob("*.py")]
    assert [f"{file}:{line}" for file in files for line in switches(file.read_text())] == []
    assert switches('if a.kind == "no_op":\n    b = {"sized": 1}[a.kind]\nc.kind == "parent"') == [1, 2]


# A kind of its own: an attention that keeps the first KV head of each group, where `attn:kv` takes the group's mean.


def first_heads(layer, shape, kv_heads, contribution_I):
    """Initial weights: the first of each group of adjacent KV heads."""
    state = {name: tensor for name, tensor in layer.items() if name.startswith(("self_attn.", "input_layernorm."))}
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        rows = state[name].view(kv_heads, -1, shape.head_dim, *state[name].shape[1:])
        state[name] = rows[:, 0].flatten(0, 1).contiguous()
    return state


@pytest.fixture
def toy(monkeypatch):
    """`attn:toyN`, added to the registry for one test."""
    row = replace(
        KINDS["attn", "sized"],
        name="toy",
        word="toy",
        order=99,
        spec_field=None,
        restricted_by=frozenset({"no_linear"}),
        initial_weights=f"{__name__}:first_heads",
        flag="toy",
        published_entry=None,
    )
    monkeypatch.setitem(KINDS, ("attn", "toy"), row)
    return row


@pytest.fixture
def toy_plan(toy, parent):
    """The plan of a run that offers it, beside reduced attentions of the ordinary kind."""

    def make(**parts):
        content = {
            "parent": {"path": "p"},
            "data": {"sequence_length": 16},
            "variants": {"kv_heads": [2], "ffn_ratios": [0.5], "ids": ["attn:toy1", "attn:toy2"]},
            "bld": {"tokens": 96, "batch_tokens": 96, "epochs": 10},
            "scenario": {
                "prompt_tokens": 8,
                "generated_tokens": 8,
                "batch_sizes": [2],
                "limits": {"kv_bytes_per_token": "50%"},
            },
            "constraints": {"no_op": False, "linear": False},
            "scoring": {"composition": "subblocks"},
            "target": {"costs": "roofline", "hardware": HARDWARE},
        }
        inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
        return Plan(parse_spec(content | parts, "test"), Inputs(shape=parent.shape, **inputs))

    return make


HARDWARE = {
    "device": "abacus",
    "weights": "float16",
    "activations": "float16",
    "kv_cache": "float16",
    "memory": "80GB",
    "bandwidth": "1TB/s",
    "peak_rates": {"float16": "1 GFLOP/s"},
}


def test_a_new_kind_has_an_id_a_size_check_and_a_place_in_lists(toy, parent):
    variant = Variant.parse("attn:toy2")
    assert (str(variant), variant.kind, variant.size, variant.kv_heads) == ("attn:toy2", "toy", 2, 2)
    assert BlockVariant.parse("attn:toy2+ffn:i48").attention == variant
    assert Architecture.model_validate_json('{"layers": [{"attention": "attn:toy2", "ffn": "ffn:i48"}]}')
    with pytest.raises(ValueError, match="'attn:toy' is no variant id"):
        Variant.parse("attn:toy")
    with pytest.raises(SpecError, match="variant attn:toy3 does not fit: 3 KV heads do not divide"):
        VariantsSpec(ids=(Variant.parse("attn:toy3"),)).of_layer(0, parent.shape)
    attentions, _ = VariantsSpec(kv_heads=(2,), ids=(variant, Variant.parse("attn:toy1"))).of_layer(0, parent.shape)
    assert [str(v) for v in attentions[1:]] == ["attn:kv2", "attn:linear", "attn:no_op", "attn:toy2", "attn:toy1"]


def test_a_new_kind_is_planned_trained_scored_and_costed(toy_plan, activations, initial_state, tmp_path):
    plan, variant, shape = toy_plan(), Variant.parse("attn:toy2"), activations.parent.shape
    works = [work for work in plan.all_bld() if work.variant == variant]
    assert [work.layer for work in works] == list(range(shape.layers))
    assert works[0].contributions is None
    record = bld.train_variant(works[1], activations, None, tmp_path)
    assert record.final_loss < record.initial_loss
    score = next(work for work in plan.all_scores() if work.layer == 1 and work.block.attention == variant)
    assert score.attention == works[1].key
    scored = scoring.score_block(score, activations, {str(variant): load_weights(tmp_path)})
    assert scored.kl_nats_per_token > 0
    tensors = initial_state("llama", 1, str(variant))
    assert variant_size(shape, variant).parameters == sum(tensor.numel() for tensor in tensors.values())
    assert not torch.equal(
        tensors["self_attn.k_proj.weight"], initial_state("llama", 1, "attn:kv2")["self_attn.k_proj.weight"]
    )
    (costs,) = plan.costs().values()
    assert variant in costs.variants
    record = roofline(shape, costs.variants, costs.traffic, costs.target)
    assert record.variants["attn:toy2"] == record.variants["attn:kv2"] != record.variants["attn:toy1"]
    taken = resources(plan, Architecture.of_parent(shape).replace(1, score.block))
    assert taken.bld_tasks == len(plan.all_bld())


def search_of(plan, scored_best):
    """The answer of a search over roofline costs, where one attention costs nothing and every other change does."""
    shape = plan.inputs.shape
    scores = [
        ScoreRecord(
            layer=work.layer,
            block=work.block,
            kl_nats_per_token=0.0 if str(work.block.attention) == scored_best else 1.0,
            lm_loss_increase_nats_per_token=0.0,
            top1_agreement=1.0,
            tokens=96,
        )
        for work in plan.all_scores()
    ]
    costs = {place: roofline(shape, work.variants, work.traffic, work.target) for place, work in plan.costs().items()}
    table = score_table(scores, "subblocks", "kl", plan.variants, shape)
    builder = ProblemBuilder(plan.spec.request, table, cost_table(plan.variants, shape, costs))
    return find_architecture(builder).best.architecture


def test_a_new_kind_is_searched_and_left_out_where_an_engine_cannot_run_it(toy_plan):
    found = search_of(toy_plan(), "attn:toy2")
    assert {str(block.attention) for block in found.layers} == {"attn:toy2"}
    with_engine = toy_plan(engines=["vllm"])
    assert not [work for work in with_engine.all_bld() if work.variant.kind == "toy"]
    assert {str(block.attention) for block in search_of(with_engine, "attn:toy2").layers} == {"attn:kv2"}


def test_a_new_kind_is_searched_from_tables(toy, tmp_path):
    (tmp_path / "scores.csv").write_text(
        "layer,attention,ffn,score\n0,kv4,i8,0\n0,toy2,i8,1\n0,kv2,i8,2\n1,kv4,i8,0\n1,toy2,i8,3\n1,kv2,i8,2\n"
    )
    (tmp_path / "costs.csv").write_text(
        "subblock,variant,parameters\nattn,kv4,4\nattn,kv2,2\nattn,toy2,2\nffn,i8,1\noutside,,0\n"
    )
    (tmp_path / "scenario.yaml").write_text(
        "{name: chat, prompt_tokens: 8, generated_tokens: 9, batch_sizes: [1], limits: {parameters: 6 params}}"
    )
    request = read_request([tmp_path / "scenario.yaml"])
    record = search_tables(tmp_path / "scores.csv", tmp_path / "costs.csv", request, tmp_path / "out")
    assert [str(block) for block in record.best.architecture.layers] == ["attn:toy2+ffn:i8", "attn:kv2+ffn:i8"]


def test_a_new_kind_is_assembled_and_described_and_its_export_refused(toy, parent, initial_state, tmp_path):
    own, blocks = "attn:kv4+ffn:i48", ("attn:toy2+ffn:i48",)
    architecture = Architecture.parse((*blocks, *[own] * (parent.shape.layers - 1)))
    (tmp_path / "toy").mkdir()
    (tmp_path / "child").mkdir()
    (tmp_path / "export").mkdir()
    save_file(initial_state("llama", 0, "attn:toy2"), tmp_path / "toy" / WEIGHTS)
    library = [{"attn:toy2": tmp_path / "toy"}, *({} for _ in range(parent.shape.layers - 1))]
    work = AssembleWork(parent="p", architecture=architecture, library=(), dtype="float32")
    child.assemble(work, parent, library, tmp_path / "child")
    model = child.load_child(tmp_path / "child", torch.float32, CPU)
    entry = model.config.block_configs[0]["attention"]
    assert entry == {"num_key_value_heads": 2, "no_op": False, "replace_with_linear": False, "toy": True}
    source = Source(tmp_path / "child")
    assert source.architecture == architecture
    with pytest.raises(ExportError, match="has no place for layer 0 attn:toy2"):
        export_hf(source, tmp_path / "export", widths="any")
    with pytest.raises(SpecError, match=r"layer 0 attn:toy2\+ffn:i48: the published form has no place for attn:toy2"):
        to_block_configs(architecture, parent.shape)


def test_a_kind_with_a_published_entry_is_written_and_read_in_both_forms(toy, parent, monkeypatch):
    shape = parent.shape
    published = replace(toy, published_entry=KINDS["attn", "sized"].published_entry)
    monkeypatch.setitem(KINDS, ("attn", "toy"), published)
    blocks = [BlockVariant.parse(f"attn:{size}+ffn:no_op") for size in ("toy4", "kv4", "toy1", "no_op", "linear")]
    architecture = Architecture(layers=tuple(blocks))
    entries = to_block_configs(architecture, shape)
    assert from_block_configs(entries, shape.hidden, shape.heads) == architecture
    assert all(first != second for first, second in pairwise(entries))
