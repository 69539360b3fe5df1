"""Shortlist and iterated search: the best measured candidate becomes the child, and nothing is measured twice."""

import pytest

from flows.build_library import score_variants
from flows.refine_search import find_answer, measure_candidates, refine_search
from flows.search_architecture import search_architecture
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.search.search_record import RefineRecord
from puzzle_core.work import EvaluationRecord, ScoreRecord
from tests.workflow import Recorded, artifacts, changed, of_stage, plan_of

SEARCH = {"shortlist": 3, "alpha": 0.6, "iterations": 2}


def with_refinement(spec):
    """The record of a refined search, done here."""
    search_architecture(spec)
    refine_search(spec)
    plan, context = plan_of(spec)
    return RefineRecord.model_validate(context.store().manifest(plan.refine().key).record), plan, context


def test_the_least_measured_kl_wins_and_each_is_what_an_evaluation_says(again):
    record, plan, context = with_refinement(again(search=SEARCH))
    measured = [candidate.measured_kl for candidate in record.candidates]
    assert record.candidates[record.best].measured_kl == min(measured)
    first = [candidate for candidate in record.candidates if candidate.round == 0]
    assert len(first) == 3
    assert len({candidate.solution.architecture for candidate in first}) == 3
    for candidate in record.candidates:
        manifest = context.store().manifest(plan.measure(candidate.solution.architecture).key)
        assert EvaluationRecord.model_validate(manifest.record).kl_nats_per_token == candidate.measured_kl
        assert all(use.usage <= use.threshold for use in candidate.solution.limits)
    assert find_answer(plan, context).best.architecture == record.candidates[record.best].solution.architecture


def test_rounds_go_on_only_while_the_measured_kl_falls(again):
    record, _, _ = with_refinement(again(search=SEARCH))
    best, rounds = float("inf"), sorted({candidate.round for candidate in record.candidates})
    assert len(rounds) >= 2
    for number in rounds:
        least = min(c.measured_kl for c in record.candidates if c.round == number)
        if number < rounds[-1]:
            assert least < best
        best = min(best, least)


@pytest.mark.parametrize("composition", ["pairs", "subblocks"])
def test_a_score_in_a_child_is_the_kl_of_the_child_so_changed(again, composition):
    base = find_answer(*plan_of(again())).best.architecture
    spec = again(scoring={"composition": composition})
    plan, context = plan_of(spec)
    score_variants(plan, context, base)
    places = [(layer, option) for layer in (0, 2) for option in plan.scored(layer, base)[:3]]
    measure_candidates([base.replace(layer, option.block) for layer, option in places], plan, context)
    for layer, option in places:
        score = ScoreRecord.model_validate(context.store().manifest(plan.score(layer, option, base).key).record)
        manifest = context.store().manifest(plan.measure(base.replace(layer, option.block)).key)
        measured = EvaluationRecord.model_validate(manifest.record).kl_nats_per_token
        assert score.kl_nats_per_token == pytest.approx(measured, rel=1e-4, abs=1e-6)


def test_a_refined_search_is_done_once(again):
    spec = again(search=SEARCH)
    with_refinement(spec)
    before, recorded = artifacts(spec.runtime.store), Recorded()
    assert of_stage(before, "refine")
    refine_search(spec)
    assert changed(before, artifacts(spec.runtime.store)) == set()
    assert recorded.computed() == ["open inputs"]


def test_the_whole_run_trains_the_refined_child_and_reports_the_shortlist(again):
    from flows.puzzle import puzzle

    spec = again(search=SEARCH)
    report = puzzle(spec)
    plan, context = plan_of(spec)
    directory = context.store().fetch(report)
    inputs = ReportInputs.read(directory / "report.json")
    assert inputs.child.architecture == find_answer(plan, context).best.architecture
    assert "Shortlist: predicted and measured" in (directory / "report.md").read_text()
