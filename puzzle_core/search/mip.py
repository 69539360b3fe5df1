"""The exact search: least total score within every limit; diverse solutions; runners-up (METHOD section 6)."""

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
"""Earlier choices, each with the number of layers that a new one may share with it at most."""


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
        time_limit_s: when it ends, the best so far is returned with `optimal=False`.
        relative_gap: how good is good enough, see `Solution.gap`.
        avoid: earlier choices to differ from.
        start: a choice to start from, for speed; the answer does not depend on it.

    Raises:
        InfeasibleError: no choice fits; says which limits and rules cannot hold together, and the least they could be.
        TimeLimitError: the time limit ended with neither a choice nor a proof that there is none.
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

    Fewer come back when no more exist. `time_limit_s` holds for each.

    Raises:
        SpecError: alpha is outside [0, 1), or fewer than one solution is asked for.
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
    """Per layer: its best option when the chosen one is forbidden, and the rise of the objective.

    None where limits and rules cannot hold without the layer's choice, or nothing was found in time. What differs in
    one more layer is near enough where one relaxation for all shows so; otherwise it starts a solve of its own, side by
    side on all cores: the solver leaves Python alone while it works.
    """
    bounds, least = option_bounds(problem, problem.score), sum(float(values.min()) for values in problem.score)

    def other(layer: int) -> tuple[str, float] | None:
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

    with ThreadPoolExecutor(os.cpu_count()) as side_by_side:
        return list(side_by_side.map(other, range(len(solution.choice))))


def _nearest_without(problem: Problem, choice: Choice, layer: int) -> Choice | None:
    """The best choice with another option in this layer and in one more at most, if one fits.

    Legend: J options of the layer, M options of all other layers.
    """
    others = [
        (number, option) for number, ids in enumerate(problem.options) if number != layer for option in range(len(ids))
    ]

    def changes(column: Column) -> Floats:
        """What choosing each of J and each of M adds to the sum, (J, M)."""
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
    """As `solve`, and None where no choice fits, without the work of explaining why.

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
