"""The search stage: batch sizes, the best architecture, and its baselines, frontier and prices (METHOD section 6)."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, Option
from puzzle_core.errors import InfeasibleError, SolveLimitError, SpecError
from puzzle_core.search.baselines import Influence, drop_layers, greedy, maximise, random_choice, uniform
from puzzle_core.search.best_of import Alternative, solve_best
from puzzle_core.search.effort import Effort
from puzzle_core.search.frontier import NODES, capacity_range, frontier, sweep_frontier, traded, without_free
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.messages import batch_text, infeasible_text
from puzzle_core.search.mip import solve, solve_diverse, solve_or_none
from puzzle_core.search.problem import Limit, Problem, Solution, describe
from puzzle_core.search.problem_builder import BatchSizes, ProblemBuilder, ResolvedLimit
from puzzle_core.search.search_record import BatchSizeOutcome, FoundArchitecture, LimitPrice, RunnerUp, SearchRecord
from puzzle_core.search.sensitivity import explain

RELATIVE_GAP = 1e-6
BASELINE_GAP = 1e-4
"""Of the baseline `maximise`, whose score nobody reads to more digits."""


def find_architecture(
    builder: ProblemBuilder,
    on_answer: Callable[[SearchRecord], None] | None = None,
    influence: Influence | None = None,
) -> SearchRecord:
    """Search all batch sizes and keep the one whose best architecture scores best; at a tie, the larger batch.

    Args:
        on_answer: gets the answer as soon as it is known, without baselines, frontier, prices and runners-up.
        influence: of runs of layers, for baselines that drop layers.

    Raises:
        InfeasibleError: no architecture meets the limits at any combination of batch sizes; gives the distance to each.
        CoverageError: a cost is missing.
    """
    effort = _effort(builder)
    answer, batch_sizes, problem, best = _answer(builder, effort)
    if on_answer:
        on_answer(answer)
    baselines, omissions = _baselines(builder, problem, batch_sizes, effort, influence)
    points: list[FoundArchitecture] = []
    try:
        points = _frontier(builder, problem, batch_sizes, effort)
    except InfeasibleError as error:
        omissions["frontier"] = str(error)
    if unproven := sum(not point.optimal for point in points):
        omissions[f"the proof of {unproven} of {len(points)} points of the frontier"] = (
            f"{NODES:,} nodes for all points were not enough: the best score there lies between `bound` and `score`"
        )
    explained = builder.request.search.explain
    prices, runner_ups = _explanations(builder, problem, best, batch_sizes) if explained else ([], [])
    return answer.model_copy(
        update={
            "baselines": tuple(baselines),
            "omissions": omissions,
            "frontier": tuple(points),
            "prices": tuple(prices),
            "runner_ups": tuple(runner_ups),
            "met_time_limit": effort.met_time_limit,
        }
    )


def find_solutions(builder: ProblemBuilder) -> SearchRecord:
    """As `find_architecture`, without baselines, frontier, prices and runners-up."""
    return _answer(builder, _effort(builder))[0]


def _answer(builder: ProblemBuilder, effort: Effort) -> tuple[SearchRecord, BatchSizes, Problem, Solution]:
    """The record without baselines, frontier, prices and runners-up; the best batch sizes, their problem and choice."""
    spec = builder.request.search
    batch_sizes, problem, best, outcomes = _best_batch_sizes(builder, effort)
    count = max(spec.solutions, spec.shortlist)
    solutions = [best]
    if count > 1:
        solutions += solve_diverse(problem, count, spec.alpha, effort=effort, relative_gap=RELATIVE_GAP)[1:]
    answer = SearchRecord(
        objective=builder.scores.objective,
        batch_sizes=dict(batch_sizes),
        parents=builder.predict(builder.reference, batch_sizes),
        times=builder.times(batch_sizes),
        solutions=tuple(_architecture(builder, solution, batch_sizes) for solution in solutions),
        baselines=(),
        frontier=(),
        outcomes=tuple(outcomes),
        prices=(),
        runner_ups=(),
        largest_score=builder.scores.largest,
        omissions={},
        met_time_limit=effort.met_time_limit,
        accuracy=builder.request.served_on.accuracy if builder.request.served_on else "",
    )
    return answer, batch_sizes, problem, best


def check_feasible(builder: ProblemBuilder) -> None:
    """Refuse limits that no architecture can meet; scores do not matter.

    Raises:
        InfeasibleError: no architecture meets the limits at any combination of batch sizes.
    """
    problems, effort = _problems(builder), _effort(builder)
    if all(solve_or_none(problem, effort=effort) is None for problem in problems.values()):
        raise _infeasible(builder, problems, effort)


def combinations_of(builder: ProblemBuilder) -> list[BatchSizes]:
    """Every combination of the scenarios' batch sizes, the largest first."""
    scenarios = builder.request.scenarios
    sizes = (sorted(set(scenario.batch_sizes), reverse=True) for scenario in scenarios)
    names = [scenario.name for scenario in scenarios]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*sizes)]


def _best_batch_sizes(
    builder: ProblemBuilder, effort: Effort
) -> tuple[BatchSizes, Problem, Solution, list[BatchSizeOutcome]]:
    """The combination whose best architecture scores best, its problem and solution, and the outcome of every one."""
    problems, combinations = _problems(builder), combinations_of(builder)
    try:
        best = solve_best(problems, effort=effort, relative_gap=RELATIVE_GAP)
    except InfeasibleError as error:
        raise _infeasible(builder, problems, effort) from error
    outcomes = [
        _outcome(builder, batch_sizes, best.alternatives[number], effort)
        for number, batch_sizes in enumerate(combinations)
    ]
    return combinations[best.key], problems[best.key], best.solution, outcomes


def _problems(builder: ProblemBuilder) -> dict[int, Problem]:
    return {number: builder.problem(batch_sizes) for number, batch_sizes in enumerate(combinations_of(builder))}


def _infeasible(builder: ProblemBuilder, problems: Mapping[int, Problem], effort: Effort) -> InfeasibleError:
    lines = []
    for number, batch_sizes in enumerate(combinations_of(builder)):
        error = explain_infeasible(problems[number], effort=effort)
        lines.append(f"  {batch_text(batch_sizes)}: {infeasible_text(error, builder, batch_sizes)}")
    names = ", ".join(repr(scenario.name) for scenario in builder.request.scenarios)
    return InfeasibleError(f"scenario {names} has no architecture within its limits:\n" + "\n".join(lines))


def _outcome(
    builder: ProblemBuilder, batch_sizes: BatchSizes, alternative: Alternative, effort: Effort
) -> BatchSizeOutcome:
    score = alternative.solution.objective if alternative.solution else None
    if alternative.infeasible:
        outcome = f"infeasible: {infeasible_text(alternative.infeasible, builder, batch_sizes)}"
    elif alternative.undecided:
        outcome = f"not decided in {effort.text}: it scores {alternative.bound:.6g} at least"
    elif alternative.solution:
        outcome = "solved"
    else:
        outcome = f"left out: it scores {alternative.bound:.6g} at least"
    return BatchSizeOutcome(batch_sizes=dict(batch_sizes), score=score, outcome=outcome)


def _effort(builder: ProblemBuilder) -> Effort:
    spec = builder.request.search
    return Effort(spec.node_limit, spec.time_limit_s or math.inf)


def _baselines(
    builder: ProblemBuilder, problem: Problem, batch_sizes: BatchSizes, effort: Effort, influence: Influence | None
) -> tuple[list[FoundArchitecture], dict[str, str]]:
    """The architectures of the baselines, and the reason for every baseline that has none."""
    parameters = f"{builder.request.scenario.name}/parameters"
    methods: dict[str, Callable[[Problem], Solution]] = {
        "mip_no_op_only": lambda problem: _no_op_only(builder, problem, effort),
        "mip_lm_loss": lambda problem: _lm_loss(builder, problem, effort),
        "greedy": greedy,
        "uniform": uniform,
        "random": lambda problem: random_choice(problem, seed=0),
        "maximise_parameters": lambda problem: maximise(problem, parameters, effort=effort, relative_gap=BASELINE_GAP),
        "depth": lambda problem: _depth(problem, influence, together=False),
        "depth_run": lambda problem: _depth(problem, influence, together=True),
    }
    architectures, omissions = [], {}
    for name in builder.request.search.baselines:
        try:
            solution = replace(methods[name](problem), method=name)
            architectures.append(_architecture(builder, solution, batch_sizes))
        except (InfeasibleError, SpecError, SolveLimitError) as error:
            omissions[f"baseline {name}"] = str(error)
    return architectures, omissions


def _no_op_only(builder: ProblemBuilder, problem: Problem, effort: Effort) -> Solution:
    """The exact search where every subblock is the parent's or a no-op."""

    def kept(layer: int, option_id: str) -> bool:
        own = builder.scores.parent.layers[layer]
        attentions, ffns = (own.attention, EMPTY_BLOCK.attention), (own.ffn, EMPTY_BLOCK.ffn)
        blocks = (option.block for option in builder.layers[layer] if str(option) == option_id)
        return any(block.attention in attentions and block.ffn in ffns for block in blocks)

    return _as_choice(problem, solve(problem.restrict(kept), effort=effort))


def _lm_loss(builder: ProblemBuilder, problem: Problem, effort: Effort) -> Solution:
    """The exact search for the least increase of the next-token loss."""
    lm_loss = builder.scores.lm_loss
    if lm_loss is None:
        raise SpecError(f"the scores are {builder.scores.objective}, and have no increase of the next-token loss")
    score = builder.column(lambda layer, option: lm_loss[layer][option])
    return _as_choice(problem, solve(replace(problem, score=score), effort=effort))


def _depth(problem: Problem, influence: Influence | None, together: bool) -> Solution:
    """Whole layers of the parent dropped."""
    if influence is None:
        raise SpecError("there is no influence of layers, which a run measures in its parent and tables do not have")
    return drop_layers(problem, influence, str(Option(EMPTY_BLOCK)), together)


def _as_choice(problem: Problem, solution: Solution) -> Solution:
    """The same options as a choice of this problem, with its scores."""
    choice = [ids.index(option) for ids, option in zip(problem.options, solution.options, strict=True)]
    return describe(problem, choice, method=solution.method, seconds=solution.seconds)


def _frontier(
    builder: ProblemBuilder, problem: Problem, batch_sizes: BatchSizes, effort: Effort
) -> list[FoundArchitecture]:
    """Score against the limit that the request names, or against time at the best batch size.

    All other limits hold, and a model that uses nothing at all is no point.
    """
    if builder.request.search.frontier_limit:
        return _limit_frontier(builder, builder.request.search.frontier_limit, effort)
    resource = f"{builder.request.scenario.name}/runtime_ms"
    if resource not in problem.resources:
        return []
    others = (limit for limit in problem.limits if limit.resource != resource)
    time = Limit("time", resource, problem.total(resource, problem.parent), "ms")
    swept = without_free(problem.with_limits((*others, time)), time.name, builder.outside(resource, batch_sizes))
    points = frontier(swept, time.name, builder.request.search.frontier_points, effort=effort)
    return [_architecture(builder, point, batch_sizes) for point in points]


def _limit_frontier(builder: ProblemBuilder, name: str, effort: Effort) -> list[FoundArchitecture]:
    """Score against a limit of the main scenario, over all batch sizes, other limits held."""
    combinations, label = combinations_of(builder), f"{builder.request.scenario.name}/{name}"
    count, whole = builder.request.search.frontier_points, effort.part(effort.nodes)
    share = whole.part(NODES // (2 * len(combinations) + count))
    limits: dict[int, ResolvedLimit] = {}
    problems, ends = {}, []
    for number, batch_sizes in enumerate(combinations):
        limit = _limit_to_sweep(builder, name, batch_sizes)
        outside = builder.outside(limit.resource, batch_sizes)
        problem = without_free(builder.problem(batch_sizes), label, outside)
        try:
            capacities = capacity_range(problem, label, effort=share, relative_gap=RELATIVE_GAP)
        except InfeasibleError:
            continue
        limits[number], problems[number] = limit, problem
        ends += [limit.in_terms(capacity + limit.outside) for capacity in capacities]
    if not problems:
        return []
    tightest, loosest = (max(ends), min(ends)) if next(iter(limits.values())).tokens else (min(ends), max(ends))
    terms = np.linspace(tightest, loosest, count)
    sweep = {number: [limit.capacity_of(term) for term in terms] for number, limit in limits.items()}
    left = NODES - whole.spent
    points = sweep_frontier(problems, label, sweep, effort=effort, relative_gap=RELATIVE_GAP, nodes=left)
    return [_architecture(builder, point.solution, combinations[point.key]) for point in traded(points)]


def _limit_to_sweep(builder: ProblemBuilder, name: str, batch_sizes: BatchSizes) -> ResolvedLimit:
    main = builder.request.scenario
    for limit in builder.limits(batch_sizes):
        if (limit.scenario, limit.name) == (main.name, name):
            return limit
    names = ", ".join(main.limits.by_name()) or "none"
    raise SpecError(f"search.frontier_limit is {name!r}, and scenario {main.name} has no such limit (it has: {names})")


def _explanations(
    builder: ProblemBuilder, problem: Problem, best: Solution, batch_sizes: BatchSizes
) -> tuple[list[LimitPrice], list[RunnerUp]]:
    """The gain when each limit is relaxed by its step, in its own unit, and the runners-up."""
    limits = {limit.label: limit for limit in builder.limits(batch_sizes)}
    steps = {label: limit.step for label, limit in limits.items()}
    prices, others = explain(problem, best, steps=steps, relative_gap=RELATIVE_GAP)
    found = []
    for price in prices:
        limit = limits[price.limit.name]
        step = limit.in_terms(limit.capacity + price.step) - limit.in_terms(limit.capacity)
        found.append(
            LimitPrice(
                scenario=limit.scenario,
                limit=limit.name,
                unit=limit.unit,
                step=step,
                at_least=price.at_least,
                at_most=price.at_most,
            )
        )
    runner_ups = [
        RunnerUp(
            layer=layer,
            option=option,
            others=other.options,
            at_least=other.at_least if math.isfinite(other.at_least) else None,
            at_most=other.at_most if math.isfinite(other.at_most) else None,
        )
        for layer, (option, other) in enumerate(zip(best.options, others, strict=True))
    ]
    return found, runner_ups


def _architecture(builder: ProblemBuilder, solution: Solution, batch_sizes: BatchSizes) -> FoundArchitecture:
    """A solution as an architecture; the layers that a spanning block covers are empty."""
    options = builder.options_of(solution.choice)
    architecture = Architecture.of_options(option for option in options if option)
    return FoundArchitecture(
        method=solution.method,
        architecture=architecture,
        score=solution.objective,
        bound=solution.bound,
        gap=solution.gap,
        optimal=solution.optimal,
        seconds=solution.seconds,
        predictions=builder.predict(architecture, batch_sizes),
        limits=builder.limit_uses(architecture, batch_sizes),
    )
