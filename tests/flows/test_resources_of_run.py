"""Tasks, tokens and bytes of a finished run against those by formula."""

from benchmarks.scale import found_of
from puzzle_core.resources import resources
from puzzle_core.spec import parse_spec
from tests.workflow import SCORED, TRAINED, plan_of


def test_a_finished_run_took_what_the_formulas_say(finished):
    plan, context = plan_of(parse_spec(finished.content, "test"))
    found = found_of(plan, context.store())
    expected = resources(plan, found.architecture)._asdict()
    assert {name: expected[name] for name in found.counts} == found.counts
    assert (found.counts["bld_tasks"], found.counts["score_tasks"]) == (TRAINED, SCORED)
    assert min(found.counts.values()) > 0
