"""The search stage: batch sizes, the best architecture, and its baselines, frontier and prices (METHOD section 6)."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from puzzle_core.architecture import EMPTY_BLOCK, Architecture
from puzzle_core.errors import InfeasibleError, SpecError, SolveLimitError
from puzzle_core.search.baselines import greedy, maximise, random_choice, uniform
from puzzle_core.search.best_of import Alternative, solve_best
from puzzle_core.search.frontier import capacity_range, frontier, sweep_frontier
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.messages import batch_text, infeasible_text
from puzzle_core.search.mip import runner_up, solve, solve_diverse, solve_or_none
from puzzle_core.search.problem import Limit, Problem, Solution, describe
from puzzle_core.search.problem_builder import BatchSizes, ProblemBuilder, ResolvedLimit
from puzzle_core.search.search_record import BatchSizeOutcome, FoundArchitecture, LimitPrice, RunnerUp, SearchRecord
from puzzle_core.search.sensitivity import RELATIVE_STEP, prices

RELATIVE_GAP = 1e-6
SIDE_SOLVES: dict[str, float] = {"time_limit_s": 0.7, "relative_gap": 1e-4}
"""Settings of the solves that do not choose the architecture: prices, runner-ups, and the baseline `maximise`."""

RUNNER_UP_GAP = 5e-4


def find_architecture(builder: ProblemBuilder) -> SearchRecord:
    """Search all batch sizes and keep the one whose best architecture scores best; at a tie, the larger batch.

    Raises:
        InfeasibleError: no architecture meets the limits at any combination of batch sizes; gives the distance to each.
        CoverageError: a cost is missing.
    """
    spec = builder.request.search
    batch_sizes, problem, best, outcomes = _best_batch_sizes(builder)
    count, limit_s = max(spec.solutions, spec.shortlist), spec.time_limit_s
    solutions = [best]
    if count > 1:
        solutions = solve_diverse(problem, count, spec.alpha, time_limit_s=limit_s, relative_gap=RELATIVE_GAP)
    baselines, omissions = _baselines(builder, problem, batch_sizes)
    return SearchRecord(
        objective=builder.scores.objective,
        batch_sizes=dict(batch_sizes),
        parents=builder.predict(_parent(builder), batch_sizes),
        times=builder.times(batch_sizes),
        solutions=tuple(_architecture(builder, solution, batch_sizes) for solution in solutions),
        baselines=tuple(baselines),
        frontier=tuple(_frontier(builder, problem, batch_sizes)),
        outcomes=tuple(outcomes),
        prices=tuple(_prices(builder, problem, best, batch_sizes)) if spec.explain else (),
        runner_ups=tuple(_runner_ups(problem, best)) if spec.explain else (),
        largest_score=builder.scores.largest,
        omissions=omissions,
    )


def check_feasible(builder: ProblemBuilder) -> None:
    """Refuse limits that no architecture can meet; scores do not matter.

    Raises:
        InfeasibleError: no architecture meets the limits at any combination of batch sizes.
    """
    problems = _problems(builder)
    if all(solve_or_none(problem, time_limit_s=_limit_s(builder)) is None for problem in problems.values()):
        raise _infeasible(builder, problems)


def combinations_of(builder: ProblemBuilder) -> list[BatchSizes]:
    """Every combination of the scenarios' batch sizes, the largest first."""
    scenarios = builder.request.scenarios
    sizes = (sorted(set(scenario.batch_sizes), reverse=True) for scenario in scenarios)
    names = [scenario.name for scenario in scenarios]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*sizes)]


def _best_batch_sizes(builder: ProblemBuilder) -> tuple[BatchSizes, Problem, Solution, list[BatchSizeOutcome]]:
    """The combination whose best architecture scores best, its problem and solution, and the outcome of every one."""
    problems, combinations = _problems(builder), combinations_of(builder)
    try:
        best = solve_best(problems, time_limit_s=_limit_s(builder), relative_gap=RELATIVE_GAP)
    except InfeasibleError as error:
        raise _infeasible(builder, problems) from error
    outcomes = [
        _outcome(builder, batch_sizes, best.alternatives[number]) for number, batch_sizes in enumerate(combinations)
    ]
    return combinations[best.key], problems[best.key], best.solution, outcomes


def _problems(builder: ProblemBuilder) -> dict[int, Problem]:
    return {number: builder.problem(batch_sizes) for number, batch_sizes in enumerate(combinations_of(builder))}


def _infeasible(builder: ProblemBuilder, problems: Mapping[int, Problem]) -> InfeasibleError:
    lines = []
    for number, batch_sizes in enumerate(combinations_of(builder)):
        error = explain_infeasible(problems[number], time_limit_s=_limit_s(builder))
        lines.append(f"  {batch_text(batch_sizes)}: {infeasible_text(error, builder, batch_sizes)}")
    names = ", ".join(repr(scenario.name) for scenario in builder.request.scenarios)
    return InfeasibleError(f"scenario {names} has no architecture within its limits:\n" + "\n".join(lines))


def _outcome(builder: ProblemBuilder, batch_sizes: BatchSizes, alternative: Alternative) -> BatchSizeOutcome:
    score = alternative.solution.objective if alternative.solution else None
    if alternative.infeasible:
        outcome = f"infeasible: {infeasible_text(alternative.infeasible, builder, batch_sizes)}"
    elif alternative.solution:
        outcome = "solved"
    else:
        outcome = f"left out: it scores {alternative.bound:.6g} at least"
    return BatchSizeOutcome(batch_sizes=dict(batch_sizes), score=score, outcome=outcome)


def _limit_s(builder: ProblemBuilder) -> float:
    return builder.request.search.time_limit_s


def _baselines(
    builder: ProblemBuilder, problem: Problem, batch_sizes: BatchSizes
) -> tuple[list[FoundArchitecture], dict[str, str]]:
    """The architectures of the baselines, and the reason for every baseline that has none."""
    parameters = f"{builder.request.scenario.name}/parameters"
    methods: dict[str, Callable[[Problem], Solution]] = {
        "mip_no_op_only": lambda problem: _no_op_only(builder, problem),
        "mip_lm_loss": lambda problem: _lm_loss(builder, problem),
        "greedy": greedy,
        "uniform": uniform,
        "random": lambda problem: random_choice(problem, seed=0),
        "maximise_parameters": lambda problem: maximise(problem, parameters, **SIDE_SOLVES),
    }
    architectures, omissions = [], {}
    for name in builder.request.search.baselines:
        try:
            solution = replace(methods[name](problem), method=name)
            architectures.append(_architecture(builder, solution, batch_sizes))
        except (InfeasibleError, SpecError, SolveLimitError) as error:
            omissions[f"baseline {name}"] = str(error)
    return architectures, omissions


def _no_op_only(builder: ProblemBuilder, problem: Problem) -> Solution:
    """The exact search where every subblock is the parent's or a no-op."""
    parent = builder.scores.parent
    attentions = (parent.attention, EMPTY_BLOCK.attention)
    ffns = (parent.ffn, EMPTY_BLOCK.ffn)

    def kept(layer: int, option_id: str) -> bool:
        blocks = (option.block for option in builder.layers[layer] if str(option) == option_id)
        return any(block.attention in attentions and block.ffn in ffns for block in blocks)

    return _as_choice(problem, solve(problem.restrict(kept), time_limit_s=_limit_s(builder)))


def _lm_loss(builder: ProblemBuilder, problem: Problem) -> Solution:
    """The exact search for the least increase of the next-token loss."""
    lm_loss = builder.scores.lm_loss
    if lm_loss is None:
        raise SpecError(f"the scores are {builder.scores.objective}, and have no increase of the next-token loss")
    score = builder.column(lambda layer, option: lm_loss[layer][option])
    return _as_choice(problem, solve(replace(problem, score=score), time_limit_s=_limit_s(builder)))


def _as_choice(problem: Problem, solution: Solution) -> Solution:
    """The same options as a choice of this problem, with its scores."""
    choice = [ids.index(option) for ids, option in zip(problem.options, solution.options, strict=True)]
    return describe(problem, choice, method=solution.method, seconds=solution.seconds)


def _frontier(builder: ProblemBuilder, problem: Problem, batch_sizes: BatchSizes) -> list[FoundArchitecture]:
    """Score against the limit that the request names, or against time at the best batch size."""
    if builder.request.search.frontier_limit:
        return _limit_frontier(builder, builder.request.search.frontier_limit)
    resource = f"{builder.request.scenario.name}/runtime_ms"
    if resource not in problem.resources:
        return []
    unlimited = problem.with_limits((Limit("time", resource, problem.total(resource, problem.parent), "ms"),))
    points = frontier(unlimited, "time", builder.request.search.frontier_points, time_limit_s=_limit_s(builder))
    return [_architecture(builder, point, batch_sizes) for point in points]


def _limit_frontier(builder: ProblemBuilder, name: str) -> list[FoundArchitecture]:
    """Score against a limit of the main scenario, over all batch sizes, other limits held."""
    combinations, label = combinations_of(builder), f"{builder.request.scenario.name}/{name}"
    limits: dict[int, ResolvedLimit] = {}
    problems, ends = {}, []
    for number, batch_sizes in enumerate(combinations):
        limit = _limit_to_sweep(builder, name, batch_sizes)
        problem = builder.problem(batch_sizes)
        try:
            capacities = capacity_range(problem, label, time_limit_s=_limit_s(builder), relative_gap=RELATIVE_GAP)
        except InfeasibleError:
            continue
        limits[number], problems[number] = limit, problem
        ends += [limit.in_terms(capacity + limit.outside) for capacity in capacities]
    if not problems:
        return []
    tightest, loosest = (max(ends), min(ends)) if next(iter(limits.values())).tokens else (min(ends), max(ends))
    terms = np.linspace(tightest, loosest, builder.request.search.frontier_points)
    sweep = {number: [limit.capacity_of(term) for term in terms] for number, limit in limits.items()}
    points = sweep_frontier(problems, label, sweep, time_limit_s=_limit_s(builder), relative_gap=RELATIVE_GAP)
    architectures: list[FoundArchitecture] = []
    for point in points:
        if point and (not architectures or point.solution.objective < architectures[-1].score):
            architectures.append(_architecture(builder, point.solution, combinations[point.key]))
    return architectures


def _limit_to_sweep(builder: ProblemBuilder, name: str, batch_sizes: BatchSizes) -> ResolvedLimit:
    main = builder.request.scenario
    for limit in builder.limits(batch_sizes):
        if (limit.scenario, limit.name) == (main.name, name):
            return limit
    names = ", ".join(main.limits.by_name()) or "none"
    raise SpecError(f"search.frontier_limit is {name!r}, and scenario {main.name} has no such limit (it has: {names})")


def _prices(builder: ProblemBuilder, problem: Problem, best: Solution, batch_sizes: BatchSizes) -> list[LimitPrice]:
    """The gain in score when each limit is relaxed by RELATIVE_STEP of its capacity, in the limit's own unit."""
    limits = {limit.label: limit for limit in builder.limits(batch_sizes)}
    steps = {label: RELATIVE_STEP * limit.capacity for label, limit in limits.items()}
    found = []
    for price in prices(problem, best, steps=steps, **SIDE_SOLVES):
        limit = limits[price.limit.name]
        step = limit.in_terms(limit.capacity + price.step) - limit.in_terms(limit.capacity)
        found.append(LimitPrice(scenario=limit.scenario, limit=limit.name, unit=limit.unit, step=step, gain=price.gain))
    return found


def _runner_ups(problem: Problem, best: Solution) -> list[RunnerUp]:
    others = runner_up(problem, best, time_limit_s=SIDE_SOLVES["time_limit_s"], relative_gap=RUNNER_UP_GAP)
    return [
        RunnerUp(layer=layer, option=option, other=other and other[0], rise=other and other[1])
        for layer, (option, other) in enumerate(zip(best.options, others, strict=True))
    ]


def _architecture(builder: ProblemBuilder, solution: Solution, batch_sizes: BatchSizes) -> FoundArchitecture:
    """A solution as an architecture; the layers that a spanning block covers are empty."""
    options = builder.options_of(solution.choice)
    architecture = Architecture(layers=tuple(option.block if option else EMPTY_BLOCK for option in options))
    return FoundArchitecture(
        method=solution.method,
        architecture=architecture,
        spans={layer: option.span for layer, option in enumerate(options) if option and option.span > 1},
        score=solution.objective,
        bound=solution.bound,
        gap=solution.gap,
        optimal=solution.optimal,
        seconds=solution.seconds,
        predictions=builder.predict(architecture, batch_sizes),
        limits=builder.limit_uses(architecture, batch_sizes),
    )


def _parent(builder: ProblemBuilder) -> Architecture:
    return Architecture(layers=(builder.scores.parent,) * len(builder.layers))
