"""The whole method: from a parent to a child for one hardware target and scenario."""

import logging

from prefect import flow

from flows.build_library import build_planned_library
from flows.permissions import permitted
from flows.refine_search import find_answer, refine_planned_search
from flows.run_graph import call_flow
from flows.search_architecture import answering_plan, measure_target, search_planned_architecture
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import ensure, ensure_tokens, plan_run, retry_after_damage
from flows.train_child import report_work, train_planned_child
from puzzle_core.plan import Plan, RoundChild
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
    return retry_after_damage(spec, lambda: _from_parent_to_report(spec, plan, context))


@flow(
    name="round",
    flow_run_name="round {number} of {spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def run_round(number: int, spec: RunSpec, plan: Plan, context: RunContext) -> tuple[Plan, RunContext]:
    """An earlier round of iterated Puzzle (METHOD section 10).

    Args:
        number: of the round, counted from 1.
        spec: of the whole run.
        plan: of the round.
        context: its places.

    Returns:
        The plan and the context of the next round, whose parent is the child of this one.
    """
    log.info("round %d of %d", number, len(spec.rounds) + 1)
    with tracked(f"round {number}", plan.spec) as run:
        show_tracked(plan, run)
        plan = _from_parent_to_child(plan, context)
    architecture = find_answer(plan, context).best.architecture
    child = RoundChild(key=plan.gkd(architecture).key, architecture=architecture)
    return Plan(spec, plan.inputs.after(child)), context.model_copy(update={"child": child.key})


def _from_parent_to_child(plan: Plan, context: RunContext) -> Plan:
    """The stages of one round; the first parent's plan has one round where the specification names none.

    Returns:
        The plan whose search gave the child.
    """
    ensure_tokens(plan, context, *plan.splits)
    measure_target(plan, context)
    read = ("calibration", "bld", *plan.scoring_splits)
    call_flow(build_planned_library, plan, context, after=[plan.tokens(split).key for split in read])
    call_flow(search_planned_architecture, plan, context, after=read_keys(plan.search()))
    plan = answering_plan(plan, context)
    search = plan.search().key
    if refine := plan.refine():
        call_flow(refine_planned_search, plan, context, after=[search])
    tokens = [plan.tokens(split).key for split in (*plan.gkd_splits, "evaluation")]
    call_flow(train_planned_child, plan, context, after=[search, *([refine.key] if refine else []), *tokens])
    return plan


def _from_parent_to_report(spec: RunSpec, plan: Plan, context: RunContext) -> str:
    stored_keys = context.store().keys()
    with tracked(spec.name, spec.with_dtype(plan.inputs.auto_dtype)) as run:
        show_tracked(plan, run)
        for number in range(1, len(spec.rounds) + 1):
            plan, context = call_flow(run_round, number, spec, plan, context, after=[plan.inputs.parent])
        plan = _from_parent_to_child(plan, context)
        work = report_work(plan, context)
        key = ensure(write_report, work, context)
        record_report(plan, context, run, work)
        show_report(plan, context, key)
    made = len(context.store().keys() - stored_keys)
    log.info("made %s", f"{made} artifacts" if made else "nothing: every artifact was in the store")
    return key
