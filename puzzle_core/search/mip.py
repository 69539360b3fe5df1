"""The exact search: the least total score within all limits, diverse solutions (METHOD section 6)."""

import math
import time
from collections.abc import Sequence

from puzzle_core.errors import SpecError
from puzzle_core.search.effort import BY_NODES, Effort
from puzzle_core.search.highs import minimise
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.problem import Choice, Problem, Solution, describe

Avoid = Sequence[tuple[Choice, int]]
"""Earlier choices, each with the maximum number of layers that a new choice may share with it."""


def solve(
    problem: Problem,
    *,
    effort: Effort = BY_NODES,
    relative_gap: float = 1e-6,
    avoid: Avoid = (),
    start: Choice | None = None,
) -> Solution:
    """The choice with the least total score within every limit and rule.

    Args:
        effort: the nodes or seconds, at whose end the best solution so far is returned with `optimal=False`.
        relative_gap: the solve stops at this gap, see `Solution.gap`.
        avoid: earlier choices to differ from.
        start: an initial choice, for speed. The result does not depend on it.

    Raises:
        InfeasibleError: no choice is feasible. Names the conflicting limits and rules and their least feasible values.
        SolveLimitError: the effort ended without a choice and without a proof of infeasibility.
    """
    solution = solve_or_none(problem, avoid=avoid, effort=effort, relative_gap=relative_gap, start=start)
    if solution is None:
        raise explain_infeasible(_avoiding(problem, avoid), effort=effort)
    return solution


def solve_diverse(
    problem: Problem,
    solutions: int,
    alpha: float = 0.8,
    *,
    effort: Effort = BY_NODES,
    relative_gap: float = 1e-6,
) -> list[Solution]:
    """Up to `solutions` choices, each the best that shares at most floor(alpha * L) layers with every earlier one.

    The list is shorter if no more exist. `effort` holds for each solve.

    Raises:
        SpecError: alpha is outside [0, 1), or `solutions` is below 1.
        InfeasibleError, SolveLimitError: as `solve`.
    """
    if not 0.0 <= alpha < 1.0 or solutions < 1:
        raise SpecError(f"diverse search needs 0 <= alpha < 1 and at least one solution, got {alpha} and {solutions}")
    shared = math.floor(alpha * len(problem.options) + 1e-9)
    chosen = [solve(problem, effort=effort, relative_gap=relative_gap)]
    while len(chosen) < solutions:
        avoid = [(earlier.choice, shared) for earlier in chosen]
        following = solve_or_none(problem, avoid=avoid, effort=effort, relative_gap=relative_gap)
        if following is None:
            break
        chosen.append(following)
    return chosen


def solve_or_none(
    problem: Problem,
    *,
    effort: Effort = BY_NODES,
    relative_gap: float = 1e-6,
    avoid: Avoid = (),
    start: Choice | None = None,
) -> Solution | None:
    """As `solve`, but None if no choice is feasible, without an explanation.

    Raises:
        SolveLimitError: as `solve`.
    """
    started = time.perf_counter()
    avoiding = _avoiding(problem, avoid)
    minimum = minimise(avoiding, problem.score, effort=effort, relative_gap=relative_gap, start=start)
    if minimum is None:
        return None
    seconds = time.perf_counter() - started
    return describe(problem, minimum.choice, method="mip", seconds=seconds, bound=minimum.bound, optimal=minimum.proven)


def _avoiding(problem: Problem, avoid: Avoid) -> Problem:
    for number, (choice, max_shared_layers) in enumerate(avoid, start=1):
        problem = problem.avoiding(choice, max_shared_layers, f"layers shared with solution {number}")
    return problem
