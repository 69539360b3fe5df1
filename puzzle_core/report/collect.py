"""Gather what a report shows from the records of its work."""

from collections.abc import Callable
from typing import Any, TypeVar

from puzzle_core.records import Record
from puzzle_core.report.inputs import ModelResult, ReportInputs
from puzzle_core.search.instance import make_costs
from puzzle_core.stages import (
    BldRecord,
    CostRecord,
    EvaluationRecord,
    GkdRecord,
    ReportWork,
    ScoreRecord,
    SearchRecord,
    TimingRecord,
)

R = TypeVar("R", bound=Record)


def collect(work: ReportWork, record_of: Callable[[str], dict[str, Any]]) -> ReportInputs:
    """The inputs of a report; models of equal architecture have equal times.

    Args:
        record_of: the record of an artifact by its key.
    """

    def record(kind: type[R], key: str) -> R:
        return kind.model_validate(record_of(key))

    search, costs = record(SearchRecord, work.search), record(CostRecord, work.costs)
    prices = make_costs(work.shape, work.spec.scenario, search.parent.batch_size, costs, work.spec.target.dtype)
    timings = record(TimingRecord, work.timing.key).models
    timing_of = {architecture: timings[name] for name, architecture in work.timing.architectures}
    models = []
    for model in work.models:
        prediction = prices.predict(model.architecture)
        models.append(
            ModelResult(
                name=model.name,
                kind=model.kind,
                architecture=model.architecture,
                evaluation=record(EvaluationRecord, model.evaluation),
                timing=timing_of.get(model.architecture),
                parameters=prediction.parameters,
                memory_bytes=prediction.memory_bytes,
            )
        )
    return ReportInputs(
        spec=work.spec,
        shape=work.shape,
        search=search,
        bld=tuple(record(BldRecord, key) for key in work.bld),
        scores=tuple(record(ScoreRecord, key) for key in work.scores),
        costs=costs,
        gkd=record(GkdRecord, work.gkd),
        models=tuple(models),
        artifacts={"search": work.search, "costs": work.costs, "gkd": work.gkd, "timing": work.timing.key},
    )
