"""The search stage: batch sizes, the best architecture, and what it stands beside (METHOD section 6)."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from puzzle_core.architecture import EMPTY_BLOCK, Architecture
from puzzle_core.errors import InfeasibleError, SpecError, TimeLimitError
from puzzle_core.search.baselines import greedy, maximise, random_choice, uniform
from puzzle_core.search.best_of import Alternative, solve_best
from puzzle_core.search.frontier import capacity_range, frontier, sweep_frontier
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.messages import batch_text, flags, infeasible_text
from puzzle_core.search.mip import runner_up, solve, solve_diverse, solve_or_none
from puzzle_core.search.problem import Limit, Problem, Solution, describe
from puzzle_core.search.problem_builder import BatchSizes, ProblemBuilder
from puzzle_core.search.search_record import BatchSizeOutcome, FoundArchitecture, Price, RunnerUp, SearchRecord
from puzzle_core.search.sensitivity import prices

RELATIVE_GAP = 1e-6
EXPLAINED: dict[str, float] = {"time_limit_s": 0.7, "relative_gap": 1e-4}
"""How exact each solve is that only explains the answer (prices, runner-ups) or stands beside it (maximise)."""

RUNNER_UP_GAP = 5e-4
PRICE_STEP = 0.01
"""How far a limit is loosened to see what that buys, as a part of it."""


def run(instance: ProblemBuilder) -> SearchRecord:
    """Search all batch sizes and keep the one whose best architecture scores best; at a tie, the larger batch.

    Raises:
        InfeasibleError: no combination of batch sizes has an architecture that meets the limits; says by how much each
            misses.
        CoverageError: a cost is missing.
    """
    spec = instance.request.search
    batch_sizes, problem, best, tried = _best_batch_sizes(instance)
    count, limit_s = max(spec.solutions, spec.shortlist), spec.time_limit_s
    solutions = [best]
    if count > 1:
        solutions = solve_diverse(problem, count, spec.alpha, time_limit_s=limit_s, relative_gap=RELATIVE_GAP)
    found = [_found(instance, solution, batch_sizes) for solution in solutions]
    baselines, skipped = _baselines(instance, problem, batch_sizes)
    record = SearchRecord(
        objective=instance.scores.objective,
        batch_sizes=dict(batch_sizes),
        parents=instance.predict(_parent(instance), batch_sizes),
        times=instance.times(batch_sizes),
        solutions=tuple(found),
        baselines=tuple(baselines),
        frontier=tuple(_frontier(instance, problem, batch_sizes)),
        tried=tuple(tried),
        prices=tuple(_prices(instance, problem, best, batch_sizes)) if spec.explain else (),
        runner_ups=tuple(_runner_ups(problem, best)) if spec.explain else (),
        flags=(),
        skipped=skipped,
    )
    return record.model_copy(update={"flags": tuple(flags(record, instance.scores))})


def check_feasible(instance: ProblemBuilder) -> None:
    """Refuse limits that nothing can meet; the scores do not matter.

    Raises:
        InfeasibleError: no combination of batch sizes has an architecture that meets the limits.
    """
    problems = _problems(instance)
    if all(solve_or_none(problem, time_limit_s=_limit_s(instance)) is None for problem in problems.values()):
        raise _infeasible(instance, problems)


def combinations_of(instance: ProblemBuilder) -> list[BatchSizes]:
    """Every combination of the scenarios' batch sizes, the largest first."""
    scenarios = instance.request.scenarios
    sizes = (sorted(set(scenario.batch_sizes), reverse=True) for scenario in scenarios)
    return [dict(zip((s.name for s in scenarios), found, strict=True)) for found in itertools.product(*sizes)]


def _best_batch_sizes(instance: ProblemBuilder) -> tuple[BatchSizes, Problem, Solution, list[BatchSizeOutcome]]:
    """The combination whose best architecture scores best, its problem and answer, and what every one came to."""
    problems, combinations = _problems(instance), combinations_of(instance)
    try:
        best = solve_best(problems, time_limit_s=_limit_s(instance), relative_gap=RELATIVE_GAP)
    except InfeasibleError as error:
        raise _infeasible(instance, problems) from error
    tried = [
        _tried(instance, batch_sizes, best.alternatives[number]) for number, batch_sizes in enumerate(combinations)
    ]
    return combinations[best.key], problems[best.key], best.solution, tried


def _problems(instance: ProblemBuilder) -> dict[int, Problem]:
    return {number: instance.problem(batch_sizes) for number, batch_sizes in enumerate(combinations_of(instance))}


def _infeasible(instance: ProblemBuilder, problems: Mapping[int, Problem]) -> InfeasibleError:
    lines = []
    for number, batch_sizes in enumerate(combinations_of(instance)):
        error = explain_infeasible(problems[number], time_limit_s=_limit_s(instance))
        lines.append(f"  {batch_text(batch_sizes)}: {infeasible_text(error, instance, batch_sizes)}")
    names = ", ".join(repr(scenario.name) for scenario in instance.request.scenarios)
    return InfeasibleError(f"scenario {names} has no architecture within its limits:\n" + "\n".join(lines))


def _tried(instance: ProblemBuilder, batch_sizes: BatchSizes, alternative: Alternative) -> BatchSizeOutcome:
    score = alternative.solution.objective if alternative.solution else None
    if alternative.infeasible:
        outcome = f"infeasible: {infeasible_text(alternative.infeasible, instance, batch_sizes)}"
    elif alternative.solution:
        outcome = "solved"
    else:
        outcome = f"left out: it scores {alternative.bound:.6g} at least"
    return BatchSizeOutcome(batch_sizes=dict(batch_sizes), score=score, outcome=outcome)


def _limit_s(instance: ProblemBuilder) -> float:
    return instance.request.search.time_limit_s


def _baselines(
    instance: ProblemBuilder, problem: Problem, batch_sizes: BatchSizes
) -> tuple[list[FoundArchitecture], dict[str, str]]:
    """What other ways to choose come to, and why one has nothing."""
    parameters = f"{instance.request.scenario.name}/parameters"
    methods: dict[str, Callable[[Problem], Solution]] = {
        "mip_no_op_only": lambda problem: _no_op_only(instance, problem),
        "mip_lm_loss": lambda problem: _lm_loss(instance, problem),
        "greedy": greedy,
        "uniform": uniform,
        "random": lambda problem: random_choice(problem, seed=0),
        "maximise_parameters": lambda problem: maximise(problem, parameters, **EXPLAINED),
    }
    found, skipped = [], {}
    for name in instance.request.search.baselines:
        try:
            found.append(_found(instance, replace(methods[name](problem), method=name), batch_sizes))
        except (InfeasibleError, SpecError, TimeLimitError) as error:
            skipped[f"baseline {name}"] = str(error)
    return found, skipped


def _no_op_only(instance: ProblemBuilder, problem: Problem) -> Solution:
    """The exact search where subblocks are the parent's or left out."""
    own = instance.scores.parent

    def kept(layer: int, option: str) -> bool:
        blocks = (found.block for found in instance.layers[layer] if str(found) == option)
        return any(
            block.attention.is_empty or block.attention == own.attention
            for block in blocks
            if block.ffn.is_empty or block.ffn == own.ffn
        )

    return _as_choice(problem, solve(problem.restrict(kept), time_limit_s=_limit_s(instance)))


def _lm_loss(instance: ProblemBuilder, problem: Problem) -> Solution:
    """The exact search for the least increase of the next-token loss."""
    if instance.scores.lm_loss is None:
        raise SpecError(f"the scores are {instance.scores.objective}, with no increase of the next-token loss beside")
    score = instance.column(lambda layer, option: instance.scores.lm_loss[layer][option])  # type: ignore[index]
    return _as_choice(problem, solve(replace(problem, score=score), time_limit_s=_limit_s(instance)))


def _as_choice(problem: Problem, solution: Solution) -> Solution:
    """The same options as a choice of this problem, scored by it."""
    choice = [ids.index(option) for ids, option in zip(problem.options, solution.options, strict=True)]
    return describe(problem, choice, method=solution.method, seconds=solution.seconds)


def _frontier(instance: ProblemBuilder, problem: Problem, batch_sizes: BatchSizes) -> list[FoundArchitecture]:
    """The trade-off that the request asks for: of score against one limit, or against time at the chosen batch size."""
    if instance.request.search.frontier_limit:
        return _limit_frontier(instance, instance.request.search.frontier_limit)
    resource = f"{instance.request.scenario.name}/runtime_ms"
    if resource not in problem.resources:
        return []
    unlimited = problem.with_limits((Limit("time", resource, problem.total(resource, problem.parent), "ms"),))
    points = frontier(unlimited, "time", instance.request.search.frontier_points, time_limit_s=_limit_s(instance))
    return [_found(instance, point, batch_sizes) for point in points]


def _limit_frontier(instance: ProblemBuilder, name: str) -> list[FoundArchitecture]:
    """Score against a limit of the main scenario, over all batch sizes, other limits held."""
    combinations, main = combinations_of(instance), instance.request.scenario.name
    asked, problems, ends = {}, {}, []
    for number, batch_sizes in enumerate(combinations):
        found = [limit for limit in instance.asked(batch_sizes) if (limit.scenario, limit.name) == (main, name)]
        if not found:
            names = ", ".join(instance.request.scenario.limits.asked()) or "none"
            raise SpecError(
                f"search.frontier_limit is {name!r}, and scenario {main} has no such limit (it has: {names})"
            )
        problem, limit = instance.problem(batch_sizes), found[0]
        try:
            span = capacity_range(problem, limit.label, time_limit_s=_limit_s(instance), relative_gap=RELATIVE_GAP)
        except InfeasibleError:
            continue
        asked[number], problems[number] = limit, problem
        ends += [limit.in_terms(capacity + limit.outside) for capacity in span]
    if not problems:
        return []
    tightest, loosest = (max(ends), min(ends)) if next(iter(asked.values())).tokens else (min(ends), max(ends))
    terms = np.linspace(tightest, loosest, instance.request.search.frontier_points)
    capacities = {number: [limit.capacity_of(term) for term in terms] for number, limit in asked.items()}
    label = f"{main}/{name}"
    swept = sweep_frontier(problems, label, capacities, time_limit_s=_limit_s(instance), relative_gap=RELATIVE_GAP)
    points: list[FoundArchitecture] = []
    for point in swept:
        if point and (not points or point.solution.objective < points[-1].score):
            points.append(_found(instance, point.solution, combinations[point.key]))
    return points


def _prices(instance: ProblemBuilder, problem: Problem, best: Solution, batch_sizes: BatchSizes) -> list[Price]:
    """What loosening each limit by a hundredth would gain, in the limit's own terms."""
    by_label = {asked.label: asked for asked in instance.asked(batch_sizes)}
    steps = {label: PRICE_STEP * asked.capacity for label, asked in by_label.items()}
    found = []
    for price in prices(problem, best, steps=steps, **EXPLAINED):
        asked = by_label[price.limit.name]
        step = asked.in_terms(asked.capacity + price.step) - asked.in_terms(asked.capacity)
        found.append(Price(scenario=asked.scenario, limit=asked.name, unit=asked.unit, step=step, gained=price.gain))
    return found


def _runner_ups(problem: Problem, best: Solution) -> list[RunnerUp]:
    others = runner_up(problem, best, time_limit_s=EXPLAINED["time_limit_s"], relative_gap=RUNNER_UP_GAP)
    return [
        RunnerUp(layer=layer, chosen=chosen, other=other and other[0], rise=other and other[1])
        for layer, (chosen, other) in enumerate(zip(best.options, others, strict=True))
    ]


def _found(instance: ProblemBuilder, solution: Solution, batch_sizes: BatchSizes) -> FoundArchitecture:
    """An answer as an architecture; the layers that a spanning block covers are left empty."""
    options = instance.options_of(solution.choice)
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
        predictions=instance.predict(architecture, batch_sizes),
        limits=instance.limit_uses(architecture, batch_sizes),
    )


def _parent(instance: ProblemBuilder) -> Architecture:
    return Architecture(layers=(instance.scores.parent,) * len(instance.layers))
