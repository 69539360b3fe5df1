"""The gate of a specification: whether a child is good enough to become the champion of its target and scenario."""

from puzzle_core.report import derived
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_warnings import TIMED_LIMITS, exceeded_limits
from puzzle_core.report.units import percent_text
from puzzle_core.spec import ChampionSpec


def unmet(inputs: ReportInputs, gate: ChampionSpec) -> list[str]:
    """What the child lacks to become the champion, as clauses; nothing where it passes.

    Accuracy is top-1 accuracy on held-out tokens, and the mean over benchmarks where there are several.
    """
    reasons, numbers = [], derived.headline(inputs)
    kept = {name: share for name, share in numbers.items() if name.startswith(("top1_kept", "benchmarks_kept_"))}
    for name, share in kept.items():
        if share < gate.kept_accuracy:
            what = name.replace("_", " ")
            reasons.append(f"{what} is {percent_text(share)}, and the gate asks for {percent_text(gate.kept_accuracy)}")
    if not kept:
        reasons.append("the parent's accuracy is 0, so no share of it is known")
    if gate.measured_limits:
        timed = [use.name for use in inputs.search.best.limits if use.name in TIMED_LIMITS]
        if timed and (inputs.child.timing is None or inputs.parent.timing is None):
            reasons.append(f"no times were measured, and the limits on {', '.join(timed)} need them")
        reasons += exceeded_limits(inputs)
    return reasons
