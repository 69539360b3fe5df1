"""Shortlist and iterated search: the best measured candidate becomes the child, and nothing is measured twice."""

import pytest

from flows.build_library import score_variants
from flows.refine_search import find_answer, refine_search
from flows.search_architecture import search_architecture
from puzzle_core.report.inputs import ReportInputs
from puzzle_core.stages import EvaluationRecord, RefineRecord, ScoreRecord
from tests.workflow import artifacts, changed, of_stage, plan_of

SEARCH = {"shortlist": 3, "alpha": 0.6, "iterations": 2}


def refined(spec):
    """The record of a refined search, done here."""
    search_architecture(spec)
    refine_search(spec)
    plan, site = plan_of(spec)
    return RefineRecord.model_validate(site.store().manifest(plan.refine().key).record), plan, site


def test_the_least_measured_kl_wins_and_each_is_what_an_evaluation_says(again):
    record, plan, site = refined(again(search=SEARCH))
    measured = [candidate.measured_kl for candidate in record.candidates]
    assert record.candidates[record.chosen].measured_kl == min(measured)
    first = [candidate for candidate in record.candidates if candidate.round == 0]
    assert len(first) == 3
    assert len({candidate.found.architecture for candidate in first}) == 3
    for candidate in record.candidates:
        manifest = site.store().manifest(plan.measure(candidate.found.architecture).key)
        assert EvaluationRecord.model_validate(manifest.record).kl_nats_per_token == candidate.measured_kl
        assert all(use.used <= use.allowed for use in candidate.found.limits)
    assert find_answer(plan, site).chosen.architecture == record.candidates[record.chosen].found.architecture


def test_rounds_go_on_only_while_the_measured_kl_falls(again):
    record, _, _ = refined(again(search=SEARCH))
    best, rounds = float("inf"), sorted({candidate.round for candidate in record.candidates})
    assert len(rounds) >= 2
    for number in rounds:
        least = min(c.measured_kl for c in record.candidates if c.round == number)
        if number < rounds[-1]:
            assert least < best
        best = min(best, least)


@pytest.mark.parametrize("composition", ["pairs", "subblocks"])
def test_a_score_in_a_child_is_the_kl_of_the_child_so_changed(again, composition):
    base = find_answer(*plan_of(again())).chosen.architecture
    spec = again(scoring={"composition": composition})
    plan, site = plan_of(spec)
    score_variants(spec, plan, site, base)
    from flows.running import ensure
    from tasks import stages

    for layer in (0, 2):
        for block in plan.scored(layer, base)[:3]:
            changed_child = base.replace(layer, block)
            ensure(stages.assemble_child, plan.assemble(changed_child), site, label="changed")
            ensure(stages.evaluate_model, plan.measure(changed_child), site, label="changed")
            score = ScoreRecord.model_validate(site.store().manifest(plan.score(layer, block, base).key).record)
            manifest = site.store().manifest(plan.measure(changed_child).key)
            measured = EvaluationRecord.model_validate(manifest.record).kl_nats_per_token
            assert score.kl_nats_per_token == pytest.approx(measured, rel=1e-4, abs=1e-6)


def test_a_refined_search_is_done_once(again):
    spec = again(search=SEARCH)
    refined(spec)
    before = artifacts(spec.runtime.store)
    assert of_stage(before, "refine")
    refined(spec)
    assert changed(before, artifacts(spec.runtime.store)) == set()


def test_the_whole_run_trains_the_refined_child_and_reports_the_shortlist(again):
    from flows.puzzle import puzzle

    spec = again(search=SEARCH)
    report = puzzle(spec)
    plan, site = plan_of(spec)
    directory = site.store().fetch(report)
    inputs = ReportInputs.read(directory / "report.json")
    assert inputs.child.architecture == find_answer(plan, site).chosen.architecture
    assert "Shortlist: predicted and measured" in (directory / "report.md").read_text()
