"""The gate of a champion: what it asks for, and what a child lacks that does not pass."""

from puzzle_core.report.gate import unmet
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.spec import ChampionSpec
from tests.puzzle_core.report.test_report_warnings import slower, with_model

CHILD = "child after GKD"


def test_a_child_passes_that_keeps_enough_and_holds_its_limits(inputs: ReportInputs) -> None:
    child, parent = inputs.child.evaluation, inputs.parent.evaluation
    kept = child.top1_accuracy / parent.top1_accuracy
    assert unmet(inputs, ChampionSpec(kept_accuracy=kept)) == []
    (reason,) = unmet(inputs, ChampionSpec(kept_accuracy=kept + 0.01))
    assert reason.startswith("top1 kept is ")


def test_limits_count_as_measured_unless_the_gate_says_otherwise(inputs: ReportInputs) -> None:
    slow = with_model(inputs, CHILD, timing=slower(inputs.child, 2))
    assert any(
        "holds as predicted, and not as measured" in reason for reason in unmet(slow, ChampionSpec(kept_accuracy=0.01))
    )
    assert unmet(slow, ChampionSpec(kept_accuracy=0.01, measured_limits=False)) == []
    (reason,) = unmet(with_model(inputs, CHILD, timing=None), ChampionSpec(kept_accuracy=0.01))
    assert reason.startswith("no times were measured, and the limits on ")
