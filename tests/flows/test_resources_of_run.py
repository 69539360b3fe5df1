"""Tasks, tokens and bytes of a finished run against what was forecast for it."""

from benchmarks.scale import found_of
from puzzle_core.resources import forecast
from puzzle_core.spec import parse_spec
from tests.workflow import SCORED, TRAINED, plan_of


def test_a_finished_run_took_what_was_forecast(finished):
    plan, context = plan_of(parse_spec(finished.content, "test"))
    found = found_of(plan, context.store())
    told = forecast(plan, found.architecture)._asdict()
    assert {name: told[name] for name in found.counts} == found.counts
    assert (found.counts["bld_tasks"], found.counts["score_tasks"]) == (TRAINED, SCORED)
    assert min(found.counts.values()) > 0
