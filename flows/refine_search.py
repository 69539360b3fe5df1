"""Beyond the published method: measure the solutions of a search, and search again around the best one.

A search predicts the KL of an architecture as a sum of scores. This flow assembles the shortlist (diverse architectures
of one search), measures the KL of each, and takes the least. It then scores every block in that child instead of the
parent, searches again and measures the new shortlist, as long as the measured KL falls.
"""

import logging
from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.build_library import score_variants, scores_at_a_time
from flows.permissions import permitted
from flows.run_graph import call_flow, call_task
from flows.search_architecture import answering_plan
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import ensure, plan_run, side_by_side, submit, wait_all
from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.search.search_record import Candidate, RefineRecord, SearchRecord, with_refinement
from puzzle_core.spec import EvaluationSpec, RunSpec
from puzzle_core.work import EvaluateWork, EvaluationRecord
from tasks import stage_tasks
from tasks.runtime.context import RunContext
from tasks.stage_progress import StageProgress
from tasks.tracking.lineage import record_refined
from tasks.tracking.tracking import tracked

log = logging.getLogger("puzzle")


@flow(
    name="refine-search",
    flow_run_name="shortlist of {spec.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def refine_search(spec: RunSpec) -> None:
    """Assemble and measure the shortlist, and repeat the search, as `search.shortlist` and `search.iterations` say.

    Args:
        spec: The run specification; its search must be in the store.
    """
    spec = permitted(spec)
    plan, context = plan_run(spec)
    refine_planned_search.fn(answering_plan(plan, context), context)


@flow(
    name="refine-search",
    flow_run_name="shortlist of {plan.spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def refine_planned_search(plan: Plan, context: RunContext) -> None:
    """As `refine_search`, with the plan of the run that it is part of."""
    spec, work = plan.spec, plan.refine()
    if work is None:
        return
    with tracked("refine", spec) as run:
        first = _search_record(context, plan.search().key)
        key = plan.search().key
        candidates = _measured(0, key, plan, context)
        best = min(candidates, key=_kl)
        for number in range(1, spec.search.iterations + 1):
            base = best.solution.architecture
            with context.lock_activations(plan.tokens("scoring").key, spec.scoring.dtype):
                score = side_by_side(score_variants, context, scores_at_a_time(plan, context))
                call_flow(score, plan, context, base, after=[plan.measure(base).key])
            search = plan.search(base, first.batch_sizes)
            ensure(stage_tasks.choose_architecture, search, context, target=spec.target)
            measured = _measured(number, search.key, plan, context, best.measured_kl)
            candidates += measured
            best_of_round = min(measured, key=_kl)
            log.info("round %d: measured KL %.4f, before %.4f", number, _kl(best_of_round), best.measured_kl)
            if _kl(best_of_round) >= best.measured_kl:
                break
            best = best_of_round
        record = RefineRecord(best=candidates.index(best), candidates=tuple(candidates))
        measured_keys = [plan.measure(candidate.solution.architecture).key for candidate in candidates]
        ensure(stage_tasks.store_refinement, work, context, measured_keys, record=record)
        record_refined(plan, context, run, record)


def find_answer(plan: Plan, context: RunContext) -> SearchRecord:
    """The record of a plan's search; a refinement puts the candidate with the least measured KL first.

    Raises:
        ArtifactError: the store lacks the search, or its refinement.
    """
    record, work = _search_record(context, plan.search().key), plan.refine()
    if work is None:
        return record
    return with_refinement(record, context.store().record(RefineRecord, work.key))


def _search_record(context: RunContext, key: str) -> SearchRecord:
    return context.store().record(SearchRecord, key)


def _measured(number: int, key: str, plan: Plan, context: RunContext, base_kl: float = 0.0) -> list[Candidate]:
    """The best solutions of a search, assembled and measured.

    Args:
        number: the round of the search.
        key: of the search.
        plan: of the run.
        context: its places.
        base_kl: measured KL of the child that the search's scores are relative to, in nats per token; 0 for the parent.
    """
    shortlist = _search_record(context, key).solutions[: plan.spec.search.shortlist]
    with context.lock_activations(plan.tokens("scoring").key, plan.spec.evaluation.dtype):
        measure = side_by_side(measure_candidates, context)
        call_flow(measure, [solution.architecture for solution in shortlist], plan, context, after=[key])
    candidates = []
    for rank, solution in enumerate(shortlist, start=1):
        evaluation = context.store().record(EvaluationRecord, plan.measure(solution.architecture).key)
        relative_to_parent = {"score": base_kl + solution.score, "bound": base_kl + solution.bound}
        candidates.append(
            Candidate(
                round=number,
                rank=rank,
                solution=solution.model_copy(update=relative_to_parent),
                measured_kl=evaluation.kl_nats_per_token,
            )
        )
    return candidates


@flow(name="measure-candidates", persist_result=False, result_serializer="json", validate_parameters=False)
def measure_candidates(architectures: list[Architecture], plan: Plan, context: RunContext) -> None:
    """Assemble architectures, and measure their KL to the parent side by side."""
    labels = {f"candidate {number}": architecture for number, architecture in enumerate(architectures, start=1)}
    for label, architecture in labels.items():
        ensure(stage_tasks.assemble_child, plan.assemble(architecture), context, label=label)
    evaluate_missing("candidates", {label: plan.measure(each) for label, each in labels.items()}, plan, context)


def evaluate_missing(
    what: str, works: Mapping[str, EvaluateWork], plan: Plan, context: RunContext, spec: EvaluationSpec | None = None
) -> None:
    """Evaluate the models that the store has no evaluation of, by label; the parent runs once for all of them.

    Args:
        what: they are, in log lines and errors.
        works: on the same tokens and in the same type.
        plan: of the run.
        context: the run's places.
        spec: names the files of benchmarks, where works have some.
    """
    missing = {label: work for label, work in works.items() if not context.store().has(work.key)}
    evaluate = stage_tasks.evaluate_model
    files: dict[str, Any] = {"spec": spec} if spec else {}
    for label, work in works.items():
        if label not in missing:
            ensure(evaluate, work, context, label=label, **files)
    if not missing:
        return
    parent, tokens, dtype = next((work.parent, work.tokens, work.dtype) for work in missing.values())
    call_task(
        stage_tasks.capture_parent, "parent's states", [tokens],
        parent=parent, tokens=tokens, dtype=dtype, context=context,
    )  # fmt: skip
    progress = StageProgress(what, plan.spec.name)
    futures = [
        submit(evaluate, work, context, ["parent's states"], label=label, **files) for label, work in missing.items()
    ]
    wait_all(what, futures, progress=progress)
    directory = context.activations_directory(parent, tokens, dtype)
    call_task(stage_tasks.drop_activations, "drop", [work.key for work in missing.values()], directory=directory)


def _kl(candidate: Candidate) -> float:
    return candidate.measured_kl
