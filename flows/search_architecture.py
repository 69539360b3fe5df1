"""The best architecture for one target and scenario, from the library's scores and the target's costs."""

import logging

from prefect import flow

from flows.build_library import build_planned_library, capture_layers, captured, score_exactly, scores_at_a_time
from flows.permissions import permitted
from flows.run_graph import call_flow, call_task
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import ensure, ensure_tokens, plan_run, side_by_side
from puzzle_core.errors import CoverageError
from puzzle_core.plan import Plan
from puzzle_core.search.picked import picked_variants
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import RunSpec
from puzzle_core.work import ScoreWork
from tasks import stage_tasks
from tasks.runtime.context import RunContext
from tasks.store.references import read_keys
from tasks.tracking.lineage import record_architecture
from tasks.tracking.tracking import tracked
from tasks.ui_artifacts import show_architecture, show_tracked

log = logging.getLogger("puzzle")
ASKING = "asked for exact scores"


@flow(
    name="search-architecture",
    flow_run_name="search {spec.scenario.name} of {spec.name}",
    persist_result=False,
    on_running=[label_process],
    result_serializer="json",
)
@inherited_tags()
def search_architecture(spec: RunSpec) -> None:
    """Measure the target's costs, where the store lacks them, and solve the mixed-integer program.

    Args:
        spec: The run specification; the library of its parent and variants must be in the store.

    Raises:
        CoverageError: the store lacks scores.
        InfeasibleError: no architecture meets the limits.
    """
    spec = permitted(spec)
    search_planned_architecture.fn(*plan_run(spec))


@flow(
    name="search-architecture",
    flow_run_name="search {plan.spec.scenario.name} of {plan.spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def search_planned_architecture(plan: Plan, context: RunContext) -> None:
    """As `search_architecture`, with the plan of the run that it is part of.

    Where the specification asks for it, the pairs of the variants that the answer picks are trained and searched next.
    """
    _search(plan, context)
    answering = answering_plan(plan, context)
    if answering != plan:
        call_flow(build_planned_library, answering, context, after=[plan.search().key])
        _search(answering, context)


def answering_plan(plan: Plan, context: RunContext) -> Plan:
    """The plan whose search gives the architecture: that of the second stage, where coupled BLD has one.

    Raises:
        ArtifactError: the store lacks the search of the first stage.
    """
    if plan.spec.bld.coupled != "shortlist":
        return plan
    first = context.store().record(SearchRecord, plan.search().key)
    return plan.coupled_in(picked_variants(first, plan.variants, plan.inputs.shape))


def known_plan(plan: Plan, context: RunContext) -> Plan:
    """As `answering_plan`, as far as the store says: the first stage's where that has no search yet."""
    return answering_plan(plan, context) if context.store().has(plan.search().key) else plan


def _search(plan: Plan, context: RunContext) -> None:
    spec = plan.spec
    with tracked("search", spec) as run:
        show_tracked(plan, run)
        measure_target(plan, context)
        stored_keys = context.store().keys(ScoreWork.stage)
        missing = [work for work in (*plan.all_scores(), *plan.long_scores()) if work.key not in stored_keys]
        if missing:
            raise CoverageError(
                f"{len(missing)} scores are not in the store {spec.runtime.store}, the first being layer "
                f"{missing[0].layer} {missing[0].option}: run `puzzle build-library` with this spec first"
            )
        _measure_influence(plan, context)
        exact = _score_for_answer(plan, context)
        choose = stage_tasks.choose_architecture
        key = ensure(choose, plan.search(), context, exact, target=spec.target, exact=exact)
        record_architecture(plan, context, run, key)
        show_architecture(plan, context, key)


def _measure_influence(plan: Plan, context: RunContext) -> None:
    """Ensure what baselines drop layers by, where the specification names such."""
    work = plan.influence()
    if work is None:
        return
    if context.store().has(work.key):
        ensure(stage_tasks.measure_influence, work, context)
        return
    ensure_tokens(plan, context, "scoring")
    with context.lock_activations(work.tokens, work.dtype):
        capture_layers(plan, context, len(plan.layers))
        states = captured(plan.layers[-1], work.tokens, work.dtype)
        ensure(stage_tasks.measure_influence, work, context, [states])
        directory = context.activations_directory(work.parent, work.tokens, work.dtype)
        call_task(stage_tasks.drop_activations, "drop", [work.key], directory=directory)


def _score_for_answer(plan: Plan, context: RunContext) -> tuple[str, ...]:
    """Score exactly what the answer of a search over estimates uses, round by round (METHOD section 4).

    Which blocks are asked for follows from the estimates, not from what the store has: a score that another search has
    asked for is only found there.

    Returns:
        The keys of the exact scores; none if the spec's scores are not lazy, or the store has the search.
    """
    search, keys = plan.search(), tuple[str, ...]()
    if not search.exact or context.store().has(search.key):
        return keys
    ensure_tokens(plan, context, "scoring")
    tokens, dtype = plan.tokens("scoring").key, plan.spec.scoring.dtype
    with context.lock_activations(tokens, dtype):
        while asked := call_task(
            stage_tasks.ask_for_scores, ASKING, [*read_keys(search), *keys],
            work=search, target=plan.spec.target, context=context, exact=keys,
        ):  # fmt: skip
            works = [plan.exact_score(layer, option) for layer, option in asked]
            score = side_by_side(score_exactly, context, scores_at_a_time(plan, context))
            call_flow(score, plan, context, works, after=[ASKING])
            keys += tuple(work.key for work in works)
        directory = context.activations_directory(plan.inputs.parent, tokens, dtype)
        call_task(stage_tasks.drop_activations, "drop", keys, directory=directory)
    log.info("search: exact scores of %d of %d block variants", len(keys), len(search.exact))
    return keys


def measure_target(plan: Plan, context: RunContext) -> None:
    """Ensure the costs of all scenarios and batch sizes, and check that an architecture can meet the limits."""
    for work in plan.costs().values():
        ensure(stage_tasks.find_costs, work, context.of_first)
    costs = [work.key for work in plan.costs().values()]
    call_task(stage_tasks.check_limits, "limits", costs, work=plan.search(), target=plan.spec.target, context=context)
