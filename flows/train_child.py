"""From an architecture to a trained, evaluated and timed child."""

import logging

from prefect import flow

from flows.permissions import permitted
from flows.refine_search import evaluate_missing, find_answer
from flows.run_graph import call_flow
from flows.search_architecture import answering_plan
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import ensure, ensure_tokens, plan_run, side_by_side
from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import RunSpec
from puzzle_core.work import ReportedModel, ReportWork
from tasks import stage_tasks
from tasks.runtime.context import RunContext
from tasks.tracking.lineage import record_child
from tasks.tracking.tracking import tracked
from tasks.ui_artifacts import show_tracked

log = logging.getLogger("puzzle")
PARENT, ASSEMBLED, TRAINED = "parent", "child after assembly", "child after GKD"
FUSED = "child after FFN fusion"


@flow(
    name="train-child",
    flow_run_name="child of {spec.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def train_child(spec: RunSpec) -> None:
    """Assemble the chosen architecture, distil it (GKD), and evaluate it, the parent and the baselines.

    Args:
        spec: The run specification; its search must be in the store.
    """
    spec = permitted(spec)
    plan, context = plan_run(spec)
    train_planned_child.fn(answering_plan(plan, context), context)


@flow(
    name="train-child",
    flow_run_name="child of {plan.spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def train_planned_child(plan: Plan, context: RunContext) -> None:
    """As `train_child`, with the plan of the run that it is part of."""
    search = find_answer(plan, context)
    with tracked("child", plan.spec) as run:
        show_tracked(plan, run)
        ensure_tokens(plan, context, *plan.gkd_splits, "evaluation")
        architectures, refine = children(search), plan.refine()
        chosen, tokens = [refine.key if refine else plan.search().key], plan.tokens("evaluation").key
        for label, architecture in architectures.items():
            ensure(stage_tasks.assemble_child, plan.assemble(architecture), context, chosen, label=label)
        if plan.fused(search.best.architecture) != search.best.architecture:
            fused = plan.assemble(search.best.architecture, True)
            ensure(stage_tasks.assemble_child, fused, context, chosen, label=FUSED)
        for split, work in plan.trainings(search.best.architecture).items():
            ensure(stage_tasks.distil_child, work, context.of_first, run=run, label=split)
        if timing := plan.timing(timed(plan, search), search.best.prediction.batch_size):
            ensure(stage_tasks.time_models, timing, context.of_first, chosen)
        with context.lock_activations(plan.tokens("evaluation").key, plan.spec.evaluation.dtype):
            models = filter(None, evaluated(plan, search).values())
            call_flow(side_by_side(evaluate_models, context), plan, context.of_first, after=[*models, tokens])
        record_child(plan, context, run, report_work(plan, context))


@flow(
    name="evaluate-models",
    flow_run_name="evaluation of {plan.spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def evaluate_models(plan: Plan, context: RunContext) -> None:
    """Quality of the parent, the child before and after GKD, and the baselines, on the same held-out tokens."""
    evaluations = {label: plan.evaluate(key) for label, key in evaluated(plan, find_answer(plan, context)).items()}
    evaluate_missing("evaluation", evaluations, plan, context, plan.spec.evaluation)


def children(search: SearchRecord) -> dict[str, Architecture]:
    """The chosen architecture and the baselines, by label."""
    return {ASSEMBLED: search.best.architecture} | {
        baseline.method: baseline.architecture for baseline in search.baselines
    }


def timed(plan: Plan, search: SearchRecord) -> dict[str, Architecture]:
    """The architectures that are timed, by label: the parent, children of earlier rounds, the child, the baselines."""
    earlier = {_of_round(number): child.architecture for number, child in enumerate(plan.inputs.first.children)}
    fused = plan.fused(search.best.architecture)
    after_fusion = {FUSED: fused} if fused != search.best.architecture else {}
    return {PARENT: Architecture.of_parent(plan.inputs.first.shape)} | earlier | children(search) | after_fusion


def evaluated(plan: Plan, search: SearchRecord) -> dict[str, str | None]:
    """Artifact keys of all evaluated models by label; none for the parent."""
    assembled = {label: plan.assemble(architecture).key for label, architecture in children(search).items()}
    earlier = {_of_round(number): child.key for number, child in enumerate(plan.inputs.first.children)}
    if FUSED in timed(plan, search):
        assembled[FUSED] = plan.assemble(search.best.architecture, fuse_ffn=True).key
    return {PARENT: None, **earlier, TRAINED: plan.gkd(search.best.architecture).key, **assembled}


def _of_round(number: int) -> str:
    """The label of the child of an earlier round, which became a parent."""
    return f"child of round {number + 1}"


def report_work(plan: Plan, context: RunContext) -> ReportWork:
    """The report of a plan; the search must be in the store, and refined if the specification says so."""
    search = find_answer(plan, context)
    architectures = timed(plan, search) | {TRAINED: plan.fused(search.best.architecture)}
    earlier = [_of_round(number) for number in range(plan.round)]
    steps = [step for step in (ASSEMBLED, FUSED, TRAINED) if step in architectures]
    order = [PARENT, *earlier, *steps, *(baseline.method for baseline in search.baselines)]
    kinds = {PARENT: "parent", **dict.fromkeys(steps, "child"), **dict.fromkeys(earlier, "round")}
    keys = evaluated(plan, search)
    batch_size = search.best.prediction.batch_size
    refine = plan.refine()
    costs = plan.costs().get((plan.spec.scenario.name, batch_size))
    *first, gkd = [training.key for training in plan.trainings(search.best.architecture).values()]
    return ReportWork(
        spec=plan.spec_of_content(),
        shape=plan.inputs.first.shape,
        scored=plan.inputs.shape if plan.inputs.before else None,
        search=plan.search().key,
        bld=tuple(work.key for work in plan.all_bld()),
        scores=tuple(work.key for work in plan.all_scores()),
        costs=costs.key if costs else None,
        refine=refine.key if refine else None,
        gkd=gkd,
        first_gkd=first[0] if first else None,
        timing=plan.timing(timed(plan, search), batch_size),
        models=tuple(
            ReportedModel(
                name=label,
                kind=kinds.get(label, "baseline"),
                architecture=architectures[label],
                evaluation=plan.evaluate(keys[label]).key,
            )
            for label in order
        ),
    )
