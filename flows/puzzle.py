"""The whole method: from a parent to a child for one hardware target and scenario."""

import logging

from prefect import flow

from flows.build_library import build_library
from flows.refine_search import find_answer, refine_search
from flows.running import ensure, ensure_tokens, mending, plan_run
from flows.search_architecture import measure_target, search_architecture
from flows.train_child import ASSEMBLED, PARENT, TRAINED, children, evaluated, timed, train_child
from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.spec import RunSpec, RuntimeSpec
from puzzle_core.stages import ReportedModel, ReportWork
from tasks.artifacts import show_report, show_tracked
from tasks.lineage import record_report
from tasks.site import Site
from tasks.stages import write_report
from tasks.tracking import tracked

log = logging.getLogger("puzzle")


@flow(name="puzzle", flow_run_name="{spec.name}", persist_result=False, result_serializer="json")
def puzzle(spec: RunSpec) -> str:
    """Build the library, search, train and evaluate the child, and write the report.

    Args:
        spec: The run specification.

    Returns:
        The key of the report.
    """
    return mending(spec, lambda: _from_parent_to_report(spec))


def _from_parent_to_report(spec: RunSpec) -> str:
    site = Site.of(spec)
    before = site.store().keys()
    plan = plan_run(spec, site)
    with tracked(spec.name, spec) as run:
        show_tracked(plan, run)
        ensure_tokens(plan, site, "calibration", "bld", "gkd", "scoring", "evaluation")
        measure_target(plan, site)
        build_library(spec)
        search_architecture(spec)
        if plan.refine():
            refine_search(spec)
        train_child(spec)
        key = ensure(write_report, report_work(plan, site), site)
        record_report(plan, site, run, key)
        show_report(plan, site, key)
    made = len(site.store().keys() - before)
    log.info("made %s", f"{made} artifacts" if made else "nothing: every artifact was in the store")
    return key


def report_work(plan: Plan, site: Site) -> ReportWork:
    """The report of a plan whose other work is done."""
    found = find_answer(plan, site)
    own = Architecture.of_parent(plan.inputs.shape)
    architectures = {PARENT: own, ASSEMBLED: found.chosen.architecture, TRAINED: found.chosen.architecture}
    architectures |= children(found)
    kinds = {PARENT: "parent", ASSEMBLED: "child", TRAINED: "child"}
    keys = evaluated(plan, found)
    batch_size = found.chosen.prediction.batch_size
    refine = plan.refine()
    costs = plan.costs().get((plan.spec.scenario.name, batch_size))
    return ReportWork(
        spec=plan.spec.model_copy(update={"runtime": RuntimeSpec()}),
        shape=plan.inputs.shape,
        search=plan.search().key,
        bld=tuple(work.key for work in plan.all_bld()),
        scores=tuple(work.key for work in plan.all_scores()),
        costs=costs.key if costs else None,
        refine=refine.key if refine else None,
        gkd=plan.gkd(found.chosen.architecture).key,
        timing=plan.timing(timed(plan, found), batch_size),
        models=tuple(
            ReportedModel(
                name=label,
                kind=kinds.get(label, "baseline"),
                architecture=architecture,
                evaluation=plan.evaluate(keys[label]).key,
            )
            for label, architecture in architectures.items()
        ),
    )
