"""Beyond the published method: measure what the search found, and search again around the best.

A search adds up scores; here the sum is tested. The shortlist, diverse architectures of one search, is assembled and
measured, and the least measured KL wins. Then every block is scored in that child instead of the parent, the program
is solved again, and its shortlist measured, for as long as the measured KL falls.
"""

import logging

from prefect import flow

from flows.build_library import score_variants
from flows.submit import ensure, plan_run, side_by_side, submit, wait_all
from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.search.search_record import Candidate, RefineRecord, SearchRecord, with_refinement
from puzzle_core.spec import RunSpec
from puzzle_core.work import EvaluationRecord
from tasks import stage_tasks
from tasks.runtime.context import RunContext
from tasks.tracking.lineage import record_refined
from tasks.tracking.tracking import tracked

log = logging.getLogger("puzzle")


@flow(name="refine-search", flow_run_name="shortlist of {spec.name}", persist_result=False, result_serializer="json")
def refine_search(spec: RunSpec) -> None:
    """Assemble and measure the shortlist, and iterate the search, as far as the spec asks for it.

    Args:
        spec: The run specification; its search must be in the store.
    """
    context = RunContext.of(spec)
    plan = plan_run(spec, context)
    work = plan.refine()
    if work is None:
        return
    with tracked("refine", spec) as run:
        first = _search(plan, context)
        candidates = _measured(0, first, plan, context)
        best = min(candidates, key=_kl)
        for number in range(1, spec.search.iterations + 1):
            around = best.found.architecture
            with context.lock_activations(plan.tokens("scoring").key, spec.scoring.dtype):
                side_by_side(score_variants, context)(spec, plan, context, around)
            again = plan.search(around, first.batch_sizes)
            ensure(stage_tasks.search_architecture, again, context, target=spec.target)
            found = _measured(number, _answer(context, again.key), plan, context, best.measured_kl)
            candidates += found
            log.info("round %d: measured KL %.4f, before %.4f", number, _kl(min(found, key=_kl)), best.measured_kl)
            if _kl(min(found, key=_kl)) >= best.measured_kl:
                break
            best = min(found, key=_kl)
        record = RefineRecord(chosen=candidates.index(best), candidates=tuple(candidates))
        ensure(stage_tasks.store_refinement, work, context, record=record)
        record_refined(plan, context, run, record)


def find_answer(plan: Plan, context: RunContext) -> SearchRecord:
    """The answer of a plan's search, the best measured candidate first among its solutions where any was measured.

    Raises:
        ArtifactError: the search was not run, or not refined.
    """
    answer, work = _search(plan, context), plan.refine()
    if work is None:
        return answer
    return with_refinement(answer, context.store().record(RefineRecord, work.key))


def _search(plan: Plan, context: RunContext) -> SearchRecord:
    return _answer(context, plan.search().key)


def _answer(context: RunContext, key: str) -> SearchRecord:
    return context.store().record(SearchRecord, key)


def _measured(
    number: int, search: SearchRecord, plan: Plan, context: RunContext, base_kl: float = 0.0
) -> list[Candidate]:
    """The best solutions of a search, assembled and measured; scores in a child add up to its own KL."""
    shortlist = search.solutions[: plan.spec.search.shortlist]
    side_by_side(measure_candidates, context)([found.architecture for found in shortlist], plan, context)
    candidates = []
    for rank, found in enumerate(shortlist, start=1):
        evaluation = context.store().record(EvaluationRecord, plan.measure(found.architecture).key)
        whole = {"score": base_kl + found.score, "bound": base_kl + found.bound}
        candidates.append(
            Candidate(
                round=number,
                rank=rank,
                found=found.model_copy(update=whole),
                measured_kl=evaluation.kl_nats_per_token,
            )
        )
    return candidates


@flow(name="measure-candidates", persist_result=False, result_serializer="json", validate_parameters=False)
def measure_candidates(architectures: list[Architecture], plan: Plan, context: RunContext) -> None:
    """Assemble architectures, and measure their KL to the parent side by side."""
    futures = []
    for number, architecture in enumerate(architectures, start=1):
        label = f"candidate {number}"
        ensure(stage_tasks.assemble_child, plan.assemble(architecture), context, label=label)
        if not context.store().has(plan.measure(architecture).key):
            futures.append(submit(stage_tasks.evaluate_model, plan.measure(architecture), context, label=label))
    wait_all("candidates", futures)


def _kl(candidate: Candidate) -> float:
    return candidate.measured_kl
