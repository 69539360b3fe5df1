"""The search stage: one problem per batch size, the best answer, and what it stands beside (METHOD section 6)."""

from collections.abc import Callable
from dataclasses import replace

from puzzle_core.architecture import Architecture
from puzzle_core.errors import InfeasibleError
from puzzle_core.search.baselines import greedy, maximise, random_choice, uniform
from puzzle_core.search.frontier import frontier
from puzzle_core.search.instance import Costs, block_scores, build_problem, explain, limit_uses, make_costs
from puzzle_core.search.mip import solve, solve_diverse
from puzzle_core.search.problem import Limit, Problem, Solution
from puzzle_core.stages import CostRecord, Found, ScoreRecord, SearchRecord, SearchWork

RELATIVE_GAP = 1e-6
BASELINES: dict[str, Callable[[Problem], Solution]] = {
    "greedy": greedy,
    "uniform": uniform,
    "random": lambda problem: random_choice(problem, seed=0),
    "maximise_parameters": lambda problem: maximise(problem, "parameter_bytes"),
}


def run(work: SearchWork, scores: list[ScoreRecord], costs: dict[int, CostRecord]) -> SearchRecord:
    """Search every batch size and keep the one whose best architecture scores best; at a tie, the larger batch.

    Raises:
        InfeasibleError: no batch size has an architecture that meets the limits; says by how much each misses.
        CoverageError: a score or a cost is missing.
    """
    table = block_scores(scores, work.composition, work.spec.objective, work.variants, work.shape)
    answers: list[tuple[float, int, Costs, Problem, list[Solution]]] = []
    skipped: dict[str, str] = {}
    for batch_size in sorted(work.scenario.batch_sizes):
        prices = make_costs(work.shape, work.scenario, batch_size, costs[batch_size], work.dtype)
        problem = build_problem(work.variants, table, prices)
        try:
            solutions = solve_diverse(
                problem,
                work.spec.solutions,
                work.spec.alpha,
                time_limit_s=work.spec.time_limit_s,
                relative_gap=RELATIVE_GAP,
            )
        except InfeasibleError as error:
            skipped[f"batch size {batch_size}"] = explain(error, prices)
            continue
        answers.append((solutions[0].objective, -batch_size, prices, problem, solutions))
    if not answers:
        raise _infeasible(work, [f"  {place}: {reason}" for place, reason in skipped.items()])
    _, _, prices, problem, solutions = min(answers, key=lambda answer: answer[:2])
    baselines = []
    for name in work.spec.baselines:
        try:
            baselines.append(_found(replace(BASELINES[name](problem), method=name), prices))
        except InfeasibleError as error:
            skipped[f"baseline {name}"] = str(error)
    return SearchRecord(
        objective=work.spec.objective,
        parent=prices.predict(Architecture.of_parent(work.shape)),
        solutions=tuple(_found(solution, prices) for solution in solutions),
        baselines=tuple(baselines),
        frontier=tuple(_found(solution, prices) for solution in _time_frontier(problem, work.spec.frontier_points)),
        skipped=skipped,
    )


def check_feasible(work: SearchWork, costs: dict[int, CostRecord]) -> None:
    """Refuse limits that nothing can meet, from costs alone: what it takes to know this is no training.

    Raises:
        InfeasibleError: no batch size has an architecture that meets the limits.
    """
    reasons = []
    unscored = {
        (layer, block): 0.0
        for layer in range(work.shape.layers)
        for block in work.variants.blocks_of_layer(layer, work.shape)
    }
    for batch_size in work.scenario.batch_sizes:
        prices = make_costs(work.shape, work.scenario, batch_size, costs[batch_size], work.dtype)
        try:
            solve(build_problem(work.variants, unscored, prices), time_limit_s=work.spec.time_limit_s)
            return
        except InfeasibleError as error:
            reasons.append(f"  batch size {batch_size}: {explain(error, prices)}")
    raise _infeasible(work, reasons)


def _infeasible(work: SearchWork, reasons: list[str]) -> InfeasibleError:
    lines = "\n".join(reasons)
    return InfeasibleError(f"scenario {work.scenario.name!r} has no architecture within its limits:\n{lines}")


def _time_frontier(problem: Problem, points: int) -> list[Solution]:
    """The trade-off of score against prefill plus decode time, other limits left out."""
    unlimited = problem.total("total_ms", problem.parent)
    return frontier(problem.with_limits((Limit("block_time", "total_ms", unlimited, "ms"),)), "block_time", points)


def _found(solution: Solution, costs: Costs) -> Found:
    architecture = Architecture.parse(solution.options)
    return Found(
        method=solution.method,
        architecture=architecture,
        score=solution.objective,
        bound=solution.bound,
        gap=solution.gap,
        optimal=solution.optimal,
        seconds=solution.seconds,
        prediction=costs.predict(architecture),
        limits=limit_uses(costs, architecture),
    )
