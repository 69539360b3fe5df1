"""The whole method: from a parent to a child for one hardware target and scenario."""

import logging

from prefect import flow

from flows.build_library import LIBRARY_SPLITS, build_planned_library
from flows.permissions import permitted
from flows.refine_search import refine_planned_search
from flows.run_graph import call_flow
from flows.search_architecture import measure_target, search_planned_architecture
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import ensure, ensure_tokens, plan_run, retry_after_damage
from flows.train_child import report_work, train_planned_child
from puzzle_core.plan import Plan
from puzzle_core.spec import RunSpec
from tasks.runtime.context import RunContext
from tasks.stage_tasks import write_report
from tasks.store.references import read_keys
from tasks.tracking.lineage import record_report
from tasks.tracking.tracking import tracked
from tasks.ui_artifacts import show_report, show_tracked

log = logging.getLogger("puzzle")


@flow(
    name="puzzle",
    flow_run_name="{spec.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def puzzle(spec: RunSpec) -> str:
    """Build the library, search, train and evaluate the child, and write the report.

    Args:
        spec: The run specification.

    Returns:
        The key of the report.
    """
    spec = permitted(spec)
    plan, context = plan_run(spec)
    return retry_after_damage(spec, lambda: _from_parent_to_report(plan, context))


def _from_parent_to_report(plan: Plan, context: RunContext) -> str:
    stored_keys = context.store().keys()
    with tracked(plan.spec.name, plan.spec) as run:
        show_tracked(plan, run)
        ensure_tokens(plan, context, *plan.splits)
        measure_target(plan, context)
        search = plan.search()
        call_flow(build_planned_library, plan, context, after=[plan.tokens(split).key for split in LIBRARY_SPLITS])
        call_flow(search_planned_architecture, plan, context, after=read_keys(search))
        if refine := plan.refine():
            call_flow(refine_planned_search, plan, context, after=[search.key])
        tokens = [plan.tokens(split).key for split in (*plan.gkd_splits, "evaluation")]
        call_flow(train_planned_child, plan, context, after=[search.key, *([refine.key] if refine else []), *tokens])
        work = report_work(plan, context)
        key = ensure(write_report, work, context)
        record_report(plan, context, run, work)
        show_report(plan, context, key)
    made = len(context.store().keys() - stored_keys)
    log.info("made %s", f"{made} artifacts" if made else "nothing: every artifact was in the store")
    return key
