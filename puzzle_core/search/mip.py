"""The exact search: the least total score within all limits, diverse solutions, runners-up (METHOD section 6)."""

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from puzzle_core.errors import SpecError, TimeLimitError
from puzzle_core.search.highs import minimise, option_bounds
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.milp import Floats
from puzzle_core.search.problem import Choice, Column, Problem, Solution, describe

Avoid = Sequence[tuple[Choice, int]]
"""Earlier choices, each with the maximum number of layers that a new choice may share with it."""


def solve(
    problem: Problem,
    *,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
    avoid: Avoid = (),
    start: Choice | None = None,
) -> Solution:
    """The choice with the least total score within every limit and rule.

    Args:
        time_limit_s: seconds. At the limit, the best solution so far is returned with `optimal=False`.
        relative_gap: the solve stops at this gap, see `Solution.gap`.
        avoid: earlier choices to differ from.
        start: an initial choice, for speed. The result does not depend on it.

    Raises:
        InfeasibleError: no choice is feasible. Names the conflicting limits and rules and their least feasible values.
        TimeLimitError: the time limit was reached without a choice and without a proof of infeasibility.
    """
    solution = solve_or_none(problem, avoid=avoid, time_limit_s=time_limit_s, relative_gap=relative_gap, start=start)
    if solution is None:
        raise explain_infeasible(_avoiding(problem, avoid), time_limit_s=time_limit_s)
    return solution


def solve_diverse(
    problem: Problem,
    solutions: int,
    alpha: float = 0.8,
    *,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
) -> list[Solution]:
    """Up to `solutions` choices, each the best that shares at most floor(alpha * L) layers with every earlier one.

    The list is shorter if no more exist. `time_limit_s` holds for each solve.

    Raises:
        SpecError: alpha is outside [0, 1), or `solutions` is below 1.
        InfeasibleError, TimeLimitError: as `solve`.
    """
    if not 0.0 <= alpha < 1.0 or solutions < 1:
        raise SpecError(f"diverse search needs 0 <= alpha < 1 and at least one solution, got {alpha} and {solutions}")
    shared = math.floor(alpha * len(problem.options) + 1e-9)
    chosen = [solve(problem, time_limit_s=time_limit_s, relative_gap=relative_gap)]
    while len(chosen) < solutions:
        avoid = [(earlier.choice, shared) for earlier in chosen]
        following = solve_or_none(problem, avoid=avoid, time_limit_s=time_limit_s, relative_gap=relative_gap)
        if following is None:
            break
        chosen.append(following)
    return chosen


def runner_up(
    problem: Problem, solution: Solution, *, time_limit_s: float = 60.0, relative_gap: float = 1e-6
) -> list[tuple[str, float] | None]:
    """Per layer: its best option without the chosen one, and the increase of the objective.

    None if the problem is infeasible without the layer's choice, or at the time limit. A choice that differs in at most
    one more layer is accepted if one shared relaxation proves the gap. Otherwise the layer needs a solve. Solves run in
    parallel threads on all cores, because the solver releases the GIL.
    """
    bounds, least = option_bounds(problem, problem.score), sum(float(values.min()) for values in problem.score)

    def best_without(layer: int) -> tuple[str, float] | None:
        index = solution.choice[layer]
        near = _nearest_without(problem, solution.choice, layer)
        if near is not None:
            score = problem.total_score(near)
            if score - np.delete(bounds[layer], index).min(initial=math.inf) <= relative_gap * (score - least):
                return problem.options[layer][near[layer]], score - solution.objective
        avoid = [(tuple(index if number == layer else -1 for number in range(len(bounds))), 0)]
        try:
            alternative = solve_or_none(
                problem, avoid=avoid, time_limit_s=time_limit_s, relative_gap=relative_gap, start=near
            )
        except TimeLimitError:
            return None
        return None if alternative is None else (alternative.options[layer], alternative.objective - solution.objective)

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return list(executor.map(best_without, range(len(solution.choice))))


def _nearest_without(problem: Problem, choice: Choice, layer: int) -> Choice | None:
    """The best feasible choice with another option in this layer and in at most one more layer.

    Legend: J options of the layer, M options of all other layers.
    """
    others = [
        (number, option) for number, ids in enumerate(problem.options) if number != layer for option in range(len(ids))
    ]

    def changes(column: Column) -> Floats:
        """The increase of the sum for each of J with each of M or no further change, (J, 1 + M)."""
        rises = [values - values[index] for values, index in zip(column, choice, strict=True)]
        rest = np.concatenate([np.zeros(1), *rises[:layer], *rises[layer + 1 :]])
        return np.asarray(rises[layer][:, None] + rest)

    score = changes(problem.score)
    score[choice[layer]] = math.inf
    for limit in problem.limits:
        score[changes(problem.resources[limit.resource]) > limit.capacity - problem.total(limit.resource, choice)] = (
            math.inf
        )
    option, other = np.unravel_index(int(score.argmin()), score.shape)
    near = list(choice)
    near[layer] = int(option)
    if other:
        near[others[other - 1][0]] = others[other - 1][1]
    return tuple(near) if math.isfinite(score[option, other]) and problem.feasible(near) else None


def solve_or_none(
    problem: Problem,
    *,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
    avoid: Avoid = (),
    start: Choice | None = None,
) -> Solution | None:
    """As `solve`, but None if no choice is feasible, without an explanation.

    Raises:
        TimeLimitError: as `solve`.
    """
    started = time.perf_counter()
    avoiding = _avoiding(problem, avoid)
    minimum = minimise(avoiding, problem.score, time_limit_s=time_limit_s, relative_gap=relative_gap, start=start)
    if minimum is None:
        return None
    seconds = time.perf_counter() - started
    return describe(problem, minimum.choice, method="mip", seconds=seconds, bound=minimum.bound, optimal=minimum.proven)


def _avoiding(problem: Problem, avoid: Avoid) -> Problem:
    for number, (choice, max_shared_layers) in enumerate(avoid, start=1):
        problem = problem.avoiding(choice, max_shared_layers, f"layers shared with solution {number}")
    return problem
