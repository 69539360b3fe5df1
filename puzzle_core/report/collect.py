"""Gather what a report shows from the records of its work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from puzzle_core.architecture import Architecture
from puzzle_core.records import Record
from puzzle_core.report.report_inputs import ModelResult, ReportInputs
from puzzle_core.search.search_record import RefineRecord, SearchRecord, with_refinement
from puzzle_core.sizes import DTYPE_BYTES, architecture_parameters, kv_entries, parameter_bytes
from puzzle_core.work import BldRecord, CostRecord, EvaluationRecord, GkdRecord, ReportWork, ScoreRecord, TimingRecord

R = TypeVar("R", bound=Record)


def collect(work: ReportWork, record_of: Callable[[str], dict[str, Any]], parent_path: str) -> ReportInputs:
    """The inputs of a report; models of equal architecture have equal times.

    Exact scores that the search asked for replace estimates of the same blocks.

    Args:
        record_of: the record of an artifact by its key.
        parent_path: the parent as the run names it, whose last part the report shows.
    """

    def record(kind: type[R], key: str) -> R:
        return kind.model_validate(record_of(key))

    search = record(SearchRecord, work.search)
    refine = record(RefineRecord, work.refine) if work.refine else None
    if refine:
        search = with_refinement(search, refine)
    costs = record(CostRecord, work.costs) if work.costs else None
    timing_of = {}
    if work.timing:
        timings = record(TimingRecord, work.timing.key).models
        timing_of = {architecture: timings[name] for name, architecture in work.timing.architectures}
    models = []
    for model in work.models:
        models.append(
            ModelResult(
                name=model.name,
                kind=model.kind,
                architecture=model.architecture,
                evaluation=record(EvaluationRecord, model.evaluation),
                timing=timing_of.get(model.architecture),
                parameters=architecture_parameters(work.shape, model.architecture),
                memory_bytes=_memory_bytes(work, model.architecture, search.parent.batch_size, costs),
            )
        )
    scores, of_search = ([record(ScoreRecord, key) for key in keys] for keys in (work.scores, search.exact_scores))
    exact = {(score.layer, score.option): score for score in of_search}
    timing = work.timing.key if work.timing else None
    artifacts = {"search": work.search, "costs": work.costs, "first gkd": work.first_gkd, "gkd": work.gkd}
    artifacts |= {"timing": timing}
    return ReportInputs(
        spec=work.spec,
        parent_name=Path(parent_path).name,
        shape=work.shape,
        scored=work.scored,
        search=search,
        bld=tuple(record(BldRecord, key) for key in work.bld),
        scores=tuple(exact.get((score.layer, score.option), score) for score in scores),
        costs=costs,
        refine=refine,
        gkd=record(GkdRecord, work.trainings[0]),
        long_gkd=record(GkdRecord, work.gkd) if work.first_gkd else None,
        models=tuple(models),
        artifacts={name: key for name, key in artifacts.items() if key},
    )


def _memory_bytes(work: ReportWork, architecture: Architecture, batch_size: int, costs: CostRecord | None) -> float:
    """Parameters plus the KV cache of the main scenario at its full context, in the precision that costs hold for."""
    stored = DTYPE_BYTES[work.spec.target.served_dtype]
    weight_bytes, kv_bytes = (costs.weight_bytes, costs.kv_bytes) if costs else (stored, stored)
    scenario, shape, devices = work.spec.scenario, work.shape, costs.tensor_parallel if costs else 1
    entries = kv_entries(shape, architecture, scenario.prompt_tokens + scenario.generated_tokens, devices)
    weights = parameter_bytes(shape, architecture, weight_bytes, costs.embedding_bytes if costs else None)
    return weights + batch_size * entries * kv_bytes
