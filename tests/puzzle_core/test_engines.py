"""The registry of engines: what export says, what a search leaves out, what engines really do, and a row of its own."""

import importlib
import inspect
import os
import random
from pathlib import Path

import pytest
import torch

from benchmarks.engines import CASES, MARKS, PARENTS, reference, run_vllm, write_child, write_parent
from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.cost.engine_module import BenchModule, CostModule
from puzzle_core.engines import ENGINES, RESTRICTIONS, obstacles, restrictions
from puzzle_core.errors import InfeasibleError, SpecError
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.plan import Inputs, Plan
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import find_architecture
from puzzle_core.search.tables import CostRow, CostTable, Option, ScoreTable
from puzzle_core.spec import RunSpec, SearchRequest, VariantsSpec, parse_spec
from puzzle_core.target import TargetSpec
from tests import toy_engine
from tests.puzzle_core.export.conftest import MIXED, ODD_WIDTHS, OWN

READERS = {name: row.title for name, row in ENGINES.items() if row.rules}
ATTENTIONS = [Variant.parse(f"attn:{name}") for name in ("kv4", "kv2", "kv1", "linear", "no_op")]
FFNS = [Variant.parse(f"ffn:{name}") for name in ("i512", "i256", "i100", "linear", "no_op")]
PARENT = BlockVariant(attention=ATTENTIONS[0], ffn=FFNS[0])
BREAKS = {
    "no_linear": (OWN, "attn:kv4+ffn:linear", "attn:linear+ffn:i512", OWN),
    "width_grid": (OWN, "attn:kv4+ffn:i100"),
    "attention_first": ("attn:no_op+ffn:no_op", "attn:no_op+ffn:i512", OWN),
    "one_kv_heads": (OWN, "attn:kv2+ffn:i512"),
    "no_windows": (OWN, "attn:kv4:w64+ffn:i512"),
}


def test_obstacles_are_those_that_engines_have():
    free = {"transformers": [], "vLLM": [], "SGLang": [], "TensorRT-LLM": []}
    assert obstacles(Architecture.parse((OWN,) * 8)) == free
    found = obstacles(Architecture.parse(MIXED))
    assert [len(found[engine]) for engine in free] == [0, 2, 2, 0]
    assert "layer 4 ffn:linear, layer 5 attn:linear" in found["vLLM"][0]
    assert "(layer 0) has no attention" in found["vLLM"][1]
    assert "(here 1, 2, 4)" in found["SGLang"][1]
    both_empty_first = ("attn:no_op+ffn:no_op",) + (OWN,) * 7
    assert obstacles(Architecture.parse(both_empty_first)) == free
    assert len(obstacles(Architecture.parse(ODD_WIDTHS))["SGLang"]) == 2


@pytest.mark.parametrize("engine", READERS)
def test_each_rule_alone_stops_the_engines_that_have_it(engine):
    form = ENGINES[engine].formats[-1]
    stopped = {name for name, blocks in BREAKS.items() if obstacles(Architecture.parse(blocks), form)[READERS[engine]]}
    assert stopped == restrictions([engine])
    assert all(rule.source for rule in ENGINES[engine].rules)


def test_every_restriction_is_broken_by_a_case():
    assert BREAKS.keys() == RESTRICTIONS.keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_modules_of_a_row_have_the_functions_of_fixed_names(engine):
    row = ENGINES[engine]
    for name, protocol in ((row.costs_module, CostModule), (row.bench_module, BenchModule)):
        for function, declared in inspect.getmembers(protocol, inspect.isfunction) if name else ():
            if not function.startswith("_"):
                parameters = inspect.signature(getattr(importlib.import_module(name), function)).parameters
                assert list(parameters) == [*inspect.signature(declared).parameters][1:]


@pytest.mark.parametrize("engine", [name for name, row in ENGINES.items() if not row.costs_module])
def test_a_target_of_an_engine_without_measured_costs_says_what_to_do(engine):
    with pytest.raises(ValueError, match=f"engine is {engine}, which is not measured here: (measure with|set)"):
        TargetSpec(engine=engine)
    assert TargetSpec(engine=engine, costs="imported", table="costs.csv").engine == engine


def test_the_documentation_names_every_engine_with_its_formats():
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    table = page.split("## Who reads what")[1].split("\n\n")[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    exported = {name: row for name, row in ENGINES.items() if row.reads_exports}
    assert len(cells) == len(exported)
    for row, (title, form, cannot) in zip(exported.values(), cells, strict=True):
        assert title.startswith(row.title)
        assert form in row.formats
        assert len([part for part in cannot.split(";") if part]) == len(row.rules)


def choices(model, field):
    schema = model.model_json_schema()["properties"][field]
    return schema.get("items", schema)["enum"]


def test_forms_offer_the_engines_of_the_registry_those_added_later_too(monkeypatch):
    assert choices(TargetSpec, "engine") == list(ENGINES)
    assert choices(RunSpec, "engines") == [name for name in ENGINES if name != "torch"]
    monkeypatch.setitem(ENGINES, "toy", toy_engine.ROW)
    assert choices(TargetSpec, "engine")[-1] == choices(RunSpec, "engines")[-1] == "toy"


def test_an_engine_that_is_not_in_the_registry_is_refused_with_the_names_of_the_others(plan):
    with pytest.raises(SpecError, match=r"engines\.1: no such engine; use one of: .*sglang.* \(found 'toy'\)"):
        plan("vllm", "toy")


def test_a_row_that_is_added_is_read_by_spec_plan_search_and_export(monkeypatch, plan):
    """Costs and benches of the same row: tests/tasks/test_stage_tasks.py and tests/flows/cli/test_bench_command.py."""
    monkeypatch.setitem(ENGINES, "toy", toy_engine.ROW)
    assert {str(work.variant) for work in plan("toy").all_bld()} == {"attn:kv1", "ffn:i256"}
    search = {"frontier_points": 2, "explain": False, "baselines": []}
    builders = (builder(0, engines=engines, search=search) for engines in ([], ["toy"]))
    free, bound = (find_architecture(of_engines).best.architecture for of_engines in builders)
    assert len(obstacles(free)["Toy"]) > 0
    assert obstacles(bound)["Toy"] == []


def test_obstacles_are_what_stopped_vllm_when_it_ran():
    """The table in docs/engines.md is what `python -m benchmarks.engines --vllm` found."""
    lines = (Path(__file__).parents[2] / "docs" / "engines.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines.strip().splitlines()]
    column = next((n for n, name in enumerate(head) if name.startswith("vLLM")), None)
    if column is None:
        pytest.skip("the table was made without vLLM")
    assert {row[0]: row[column].startswith("ok") for row in rows} == {
        name: not obstacles(Architecture.parse(blocks))["vLLM"] for name, blocks in CASES.items()
    }


@pytest.mark.skipif("VLLM" not in os.environ, reason="VLLM does not name the interpreter of an environment with vLLM")
def test_vllm_itself_fails_where_its_rules_are_broken_and_nowhere_else(tmp_path):
    torch.set_num_threads(1)
    parent = write_parent(tmp_path / "parent", *PARENTS.get("", ("llama", {})))
    own = "attn:kv4+ffn:i768"
    written = {name: blocks for name, blocks in BREAKS.items() if name != "no_windows"}  # which an export refuses
    cases = {name: (*blocks, *(own,) * 6)[:6] for name, blocks in written.items()}
    cases = {name: tuple(block.replace("i512", "i768") for block in blocks) for name, blocks in cases.items()}
    directories, references = [], {}
    for name, blocks in cases.items():
        source = Source(write_child(parent, Architecture.parse(blocks), tmp_path / name))
        directories.append(tmp_path / f"{name}-hf")
        directories[-1].mkdir()
        export_hf(source, directories[-1], widths="any")
        references[name] = reference(source)
    _, answers = run_vllm(Path(os.environ["VLLM"]), directories, references)
    stopped = {name for name, answer in answers.items() if not answer.startswith("ok")}
    assert stopped == restrictions(["vllm"]) - {"no_windows"}


def builder(seed: int, **asked) -> ProblemBuilder:
    """Four layers of random scores, under which what engines cannot run often is best; at most half of the time."""
    chance = random.Random(seed)
    blocks = [BlockVariant(attention=a, ffn=f) for a in ATTENTIONS for f in FFNS]
    layers = [{Option(b): 0.0 if b == PARENT else chance.random() for b in blocks} for _ in range(4)]
    ms = {"linear": 1.0, "no_op": 0.0}
    rows = [CostRow(str(v), {"decode_ms": ms.get(v.kind, 2 + v.size / 100)}) for v in (*ATTENTIONS, *FFNS)]
    scenario = {"limits": {"block_decode_time": "50%"}}
    request = SearchRequest.model_validate({"scenario": scenario} | asked)
    return ProblemBuilder(
        request, ScoreTable(Architecture(layers=(PARENT,) * len(layers)), tuple(layers)), CostTable(tuple(rows))
    )


@pytest.mark.parametrize("engines", [["vllm"], ["sglang"], ["tensorrt-llm"], ["vllm", "sglang", "llama.cpp"]])
def test_every_answer_of_a_search_runs_on_its_engines(engines):
    plain = broken = 0
    for seed in range(12):
        search = {"solutions": 3, "frontier_points": 3, "explain": False}
        record = find_architecture(builder(seed, engines=engines, search=search))
        answers = (*record.solutions, *record.baselines, *record.frontier)
        for found in answers:
            said = obstacles(found.architecture) | obstacles(found.architecture, "gguf")
            assert not [said[READERS[engine]] for engine in engines if engine in READERS and said[READERS[engine]]]
        best = find_architecture(builder(seed, search=search)).best.architecture
        said = obstacles(best) | obstacles(best, "gguf")
        plain, broken = plain + 1, broken + any(said[READERS[e]] for e in engines if e in READERS)
    assert broken > plain / 2, "engines must have ruled out what would have been best"


@pytest.mark.parametrize("engines", [["llama.cpp"], ["transformers", "llama.cpp"], []])
def test_engines_that_run_everything_take_nothing_from_the_search(engines):
    assert builder(0, engines=engines).layers == builder(0).layers


def test_a_parent_that_an_engine_cannot_run_is_refused_by_name():
    found = builder(0)
    scores = ScoreTable(
        Architecture(layers=(BlockVariant(attention=ATTENTIONS[0], ffn=FFNS[2]),) * len(found.scores.layers)),
        found.scores.layers,
    )
    with pytest.raises(SpecError, match=r"rule out the parent's own ffn:i100.*\(256, for engines sglang\)"):
        ProblemBuilder(found.request.model_copy(update={"engines": ("sglang",)}), scores, found.costs)


def test_limits_that_only_the_forbidden_could_meet_are_infeasible_and_say_what_can_be_had():
    with pytest.raises(InfeasibleError, match=r"block_decode_time was 3%.*can be had.*"):
        find_architecture(builder(0, engines=["vllm"], scenario={"limits": {"block_decode_time": "3%"}}))
    find_architecture(builder(0, scenario={"limits": {"block_decode_time": "3%"}}))


SPEC = {
    "parent": {"path": "p"},
    "data": {"sequence_length": 16},
    "variants": {
        "kv_heads": [1],
        "ffn_ratios": [0.75, 0.5],
        "layers": [{"first_layer": 1, "last_layer": 1, "linear": True, "ffn_widths": [256, 300]}],
    },
    "scenario": {"prompt_tokens": 8, "generated_tokens": 8, "limits": {"memory": "60%"}},
}


@pytest.fixture
def plan(parent):
    """The plan of SPEC for the plain parent with an FFN of 512 channels, for these engines."""
    inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
    shape = parent.shape.model_copy(update={"ffn_width": 512})
    return lambda *engines: Plan(parse_spec(SPEC | {"engines": engines}, "spec"), Inputs(shape=shape, **inputs))


def test_what_an_engine_never_runs_is_neither_trained_nor_scored_and_other_keys_stay(plan):
    everything, served = plan(), plan("sglang", "llama.cpp")
    trained = {(work.layer, str(work.variant)) for work in served.all_bld()}
    assert {variant for layer, variant in trained if layer == 0} == {"attn:kv1", "ffn:i256"}
    assert {variant for layer, variant in trained if layer == 1} == {"attn:kv1", "ffn:i256"}
    assert {"ffn:i384", "ffn:linear", "attn:linear"} < {str(work.variant) for work in everything.all_bld()}
    for works in ("all_bld", "all_scores"):
        assert {w.key for w in getattr(served, works)()} < {w.key for w in getattr(everything, works)()}
    assert len(plan("vllm").all_bld()) == len([w for w in everything.all_bld() if w.variant.kind != "linear"])


def test_a_space_without_limits_is_left_as_it_is(plan):
    assert plan("llama.cpp").variants == VariantsSpec.model_validate(SPEC["variants"])


def test_a_family_that_no_format_carries_is_refused_before_any_work(plan):
    found = plan("transformers")
    inputs = found.inputs.model_copy(update={"shape": found.inputs.shape.model_copy(update={"qk_norm": True})})
    Plan(found.spec, inputs)
    with pytest.raises(SpecError, match=r"engines asks for vllm.*normalises queries"):
        Plan(found.spec.model_copy(update={"engines": ("transformers", "vllm")}), inputs)
