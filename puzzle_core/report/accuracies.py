"""What models answer right on benchmarks, and the share of the parent's accuracy that a child keeps."""

import math
import statistics
from typing import NamedTuple

from puzzle_core.report.report_inputs import ModelResult, ReportInputs

_SHARES_OF_RIGHT_ANSWERS = ("acc", "exact_match")
"""How names of lm-evaluation-harness's metrics begin that a child can keep a share of: more is better, 0 is none."""


class Accuracy(NamedTuple):
    """One metric of one benchmark; `items` and `standard_error` are None where they are not known."""

    benchmark: str
    metric: str
    items: int | None
    value: float
    standard_error: float | None


def accuracies(model: ModelResult) -> list[Accuracy]:
    """All metrics of a model: of files, then of lm-evaluation-harness."""
    found = []
    for task in model.evaluation.tasks:
        found.append(Accuracy(task.name, "accuracy", task.items, task.accuracy, task.standard_error))
        by_length = task.accuracy_by_length, task.standard_error_by_length
        found.append(Accuracy(task.name, "accuracy by length", task.items, *by_length))
    for name, metrics in sorted(model.evaluation.lm_eval.items()):
        for metric in sorted(metrics):
            base, _, key = metric.partition(",")
            if not base.endswith("_stderr"):
                found.append(Accuracy(name, metric, None, metrics[metric], metrics.get(f"{base}_stderr,{key}")))
    return found


def means(inputs: ReportInputs, model: ModelResult) -> list[Accuracy]:
    """The mean over benchmarks of every metric that two or more have; groups of lm-evaluation-harness count once."""
    named = {task.name for task in model.evaluation.tasks} | {*inputs.spec.evaluation.lm_eval_tasks}
    by_metric: dict[str, list[Accuracy]] = {}
    for accuracy in accuracies(model):
        if accuracy.benchmark in named and can_be_kept(accuracy.metric):
            by_metric.setdefault(accuracy.metric, []).append(accuracy)
    return [_mean(metric, found) for metric, found in by_metric.items() if len(found) > 1]


def can_be_kept(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric.startswith(_SHARES_OF_RIGHT_ANSWERS)


def kept(parent: ModelResult, child: ModelResult) -> dict[tuple[str, str], float]:
    """The child's share of the parent's accuracy, by benchmark and metric."""
    before = {(a.benchmark, a.metric): a.value for a in accuracies(parent) if can_be_kept(a.metric)}
    after = {(a.benchmark, a.metric): a.value for a in accuracies(child)}
    return {place: after[place] / value for place, value in before.items() if value and place in after}


def kept_in_the_mean(inputs: ReportInputs, child: ModelResult) -> dict[str, float]:
    """The child's mean over benchmarks as a share of the parent's mean, by metric."""
    before = {mean.metric: mean.value for mean in means(inputs, inputs.parent)}
    after = {mean.metric: mean.value for mean in means(inputs, child)}
    return {metric: after[metric] / value for metric, value in before.items() if value and metric in after}


def _mean(metric: str, found: list[Accuracy]) -> Accuracy:
    """The mean over benchmarks, whose items are drawn independently."""
    errors = [accuracy.standard_error for accuracy in found if accuracy.standard_error is not None]
    whole = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
    counts = [accuracy.items for accuracy in found if accuracy.items is not None]
    items = sum(counts) if len(counts) == len(found) else None
    return Accuracy(f"mean of {len(found)}", metric, items, statistics.fmean(a.value for a in found), whole)
