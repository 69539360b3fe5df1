"""The whole method: from a parent to a child for one hardware target and scenario."""

import logging

from prefect import flow

from flows.build_library import build_library
from flows.open_runs import sign
from flows.refine_search import refine_search
from flows.running import ensure, ensure_tokens, mending, plan_run
from flows.search_architecture import measure_target, search_architecture
from flows.train_child import report_work, train_child
from puzzle_core.spec import RunSpec
from tasks.artifacts import show_report, show_tracked
from tasks.lineage import record_report
from tasks.site import Site
from tasks.stages import write_report
from tasks.tracking import tracked

log = logging.getLogger("puzzle")


@flow(
    name="puzzle",
    flow_run_name="{spec.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[sign],
)
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
        work = report_work(plan, site)
        key = ensure(write_report, work, site)
        record_report(plan, site, run, work)
        show_report(plan, site, key)
    made = len(site.store().keys() - before)
    log.info("made %s", f"{made} artifacts" if made else "nothing: every artifact was in the store")
    return key
