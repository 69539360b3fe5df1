"""Iterated Puzzle on a pico parent: the child of a round is the next one's parent, and each round is done once."""

from pathlib import Path

import pytest

from flows.puzzle import puzzle
from puzzle_core.architecture import Architecture
from puzzle_core.model.parent import Parent
from puzzle_core.plan import Plan, RoundChild
from puzzle_core.report.report import making_table
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import final_table
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import ParentSpec
from tasks.store.provenance import stored_provenance
from tasks.tracking.lineage_tree import lineage_of
from tests.workflow import artifacts, of_stage, plan_of

ROUNDS = {
    "rounds": [{"limits": {"parameters": "90%"}, "gkd": {"tokens": 256}}],  # as the finished run is
    "scenario": {"limits": {"parameters": "75%"}},
    "gkd": {"tokens": 128},
}


def plans_of(spec):
    """The plans of both rounds of a finished run, and its store."""
    first, context = plan_of(spec)
    store = context.store()
    architecture = store.record(SearchRecord, first.search().key).best.architecture
    child = RoundChild(key=first.gkd(architecture).key, architecture=architecture)
    return first, Plan(spec, first.inputs.after(child)), store


@pytest.mark.long
def test_the_child_of_a_round_is_the_next_ones_parent_and_a_second_run_computes_nothing(again):
    spec = again(**ROUNDS)
    finished = artifacts(spec.runtime.store)
    report = puzzle(spec)
    first, last, store = plans_of(spec)
    child, answer = last.inputs.first.children[0], store.record(SearchRecord, last.search().key)

    whole = Architecture.of_parent(first.inputs.shape)
    assert Parent(ParentSpec(path=str(store.fetch(child.key)))).shape == last.inputs.shape
    limits = [store.record(SearchRecord, plan.search().key).best.limits[0] for plan in (first, last)]
    assert limits[1].threshold / limits[0].threshold == pytest.approx(75 / 90)
    assert all(limit.usage <= limit.threshold for limit in limits)
    assert answer.parent == store.record(SearchRecord, first.search().key).parent
    assert first.costs() == last.costs()
    assert {work.parent for work in last.all_bld()} == {child.key}
    assert last.gkd(answer.best.architecture).parent == first.inputs.parent

    inputs = ReportInputs.read(Path(spec.runtime.store) / report / "report.json")
    assert [model.name for model in inputs.models][:4] == [
        "parent",
        "child of round 1",
        "child after assembly",
        "child after GKD",
    ]
    assert inputs.parent.architecture == whole
    assert inputs.child.parameters < inputs.rounds[0].parameters < inputs.parent.parameters
    assert inputs.parent.evaluation.kl_nats_per_token == 0
    assert final_table(inputs).columns[1:3] == ("parent", "child of round 1")
    assert ("round 1", "at parameters 90%; GKD on 256 tokens") in making_table(inputs).rows
    trained = last.gkd(answer.best.architecture).key
    assert stored_provenance(store, trained).distilled_tokens == 128 + 256

    steps = {step.key: step for step in lineage_of(spec.runtime.mlflow_uri, trained)}
    assert child.key in steps[trained].sources
    assert steps[child.key].kind == "child"
    assert f"parent/{first.inputs.parent}" in steps[child.key].sources
    assert ["@" in steps[key].registered[0] for key in (child.key, trained)] == [False, True]

    before = artifacts(spec.runtime.store)
    assert of_stage(before, "gkd") >= of_stage(finished, "gkd")
    assert len(of_stage(before, "gkd")) == 2  # that of the first round was there
    assert puzzle(spec) == report
    assert artifacts(spec.runtime.store) == before
    assert len(of_stage(before, "cost")) == 1


def test_a_round_has_limits_and_whole_batches(spec_of):
    with pytest.raises(Exception, match="no limit given: a round searches at a limit"):
        spec_of(rounds=[{"limits": {}, "gkd": {"tokens": 128}}])
    with pytest.raises(Exception, match=r"rounds\.0\.gkd\.batch_tokens is 100, not a multiple of data"):
        spec_of(rounds=[{"limits": {"parameters": "85%"}, "gkd": {"tokens": 128, "batch_tokens": 100}}])
