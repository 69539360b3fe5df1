"""Beyond the published method: measure what the search found, and search again around the best.

A search adds up scores; here the sum is tested. The shortlist, diverse architectures of one search, is assembled and
measured, and the least measured KL wins. Then every block is scored in that child instead of the parent, the program
is solved again, and its shortlist measured, for as long as the measured KL falls.
"""

import logging

from prefect import flow

from flows.build_library import score_variants
from flows.running import ensure, plan_run, side_by_side, submit, wait_all
from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.spec import RunSpec
from puzzle_core.stages import Candidate, EvaluationRecord, RefineRecord, SearchRecord, refined
from tasks import stages
from tasks.lineage import record_refined
from tasks.site import Site
from tasks.tracking import tracked

log = logging.getLogger("puzzle")


@flow(name="refine-search", flow_run_name="shortlist of {spec.name}", persist_result=False, result_serializer="json")
def refine_search(spec: RunSpec) -> None:
    """Assemble and measure the shortlist, and iterate the search, as far as the spec asks for it.

    Args:
        spec: The run specification; its search must be in the store.
    """
    site = Site.of(spec)
    plan = plan_run(spec, site)
    work = plan.refine()
    if work is None:
        return
    with tracked("refine", spec) as run:
        first = _search(plan, site)
        candidates = _measured(0, first, plan, site)
        best = min(candidates, key=_kl)
        for number in range(1, spec.search.iterations + 1):
            around = best.found.architecture
            with site.claim_activations(plan.tokens("scoring").key, spec.scoring.dtype):
                side_by_side(score_variants, site)(spec, plan, site, around)
            again = plan.search(around, first.batch_sizes)
            ensure(stages.search_architecture, again, site, target=spec.target)
            found = _measured(number, _answer(site, again.key), plan, site, best.measured_kl)
            candidates += found
            log.info("round %d: measured KL %.4f, before %.4f", number, _kl(min(found, key=_kl)), best.measured_kl)
            if _kl(min(found, key=_kl)) >= best.measured_kl:
                break
            best = min(found, key=_kl)
        record = RefineRecord(chosen=candidates.index(best), candidates=tuple(candidates))
        ensure(stages.keep_refined, work, site, record=record)
        record_refined(plan, site, run, record)


def find_answer(plan: Plan, site: Site) -> SearchRecord:
    """The answer of a plan's search, the best measured candidate first among its solutions where any was measured.

    Raises:
        ArtifactError: the search was not run, or not refined.
    """
    answer, work = _search(plan, site), plan.refine()
    if work is None:
        return answer
    return refined(answer, RefineRecord.model_validate(site.store().manifest(work.key).record))


def _search(plan: Plan, site: Site) -> SearchRecord:
    return _answer(site, plan.search().key)


def _answer(site: Site, key: str) -> SearchRecord:
    return SearchRecord.model_validate(site.store().manifest(key).record)


def _measured(number: int, search: SearchRecord, plan: Plan, site: Site, base_kl: float = 0.0) -> list[Candidate]:
    """The best solutions of a search, assembled and measured; scores in a child add up to its own KL."""
    shortlist = search.solutions[: plan.spec.search.shortlist]
    side_by_side(measure_candidates, site)([found.architecture for found in shortlist], plan, site)
    candidates = []
    for rank, found in enumerate(shortlist, start=1):
        manifest = site.store().manifest(plan.measure(found.architecture).key)
        whole = {"score": base_kl + found.score, "bound": base_kl + found.bound}
        candidates.append(
            Candidate(
                round=number,
                rank=rank,
                found=found.model_copy(update=whole),
                measured_kl=EvaluationRecord.model_validate(manifest.record).kl_nats_per_token,
            )
        )
    return candidates


@flow(name="measure-candidates", persist_result=False, result_serializer="json", validate_parameters=False)
def measure_candidates(architectures: list[Architecture], plan: Plan, site: Site) -> None:
    """Assemble architectures, and measure their KL to the parent side by side."""
    futures = []
    for number, architecture in enumerate(architectures, start=1):
        label = f"candidate {number}"
        ensure(stages.assemble_child, plan.assemble(architecture), site, label=label)
        if not site.store().has(plan.measure(architecture).key):
            futures.append(submit(stages.evaluate_model, plan.measure(architecture), site, label=label))
    wait_all("candidates", futures)


def _kl(candidate: Candidate) -> float:
    return candidate.measured_kl
