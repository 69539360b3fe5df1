"""The price of each limit: the gain in score when the limit is relaxed, from a second exact search."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from puzzle_core.errors import SpecError
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem, Solution

RELATIVE_STEP = 0.01
"""The default step by which a capacity is relaxed, relative to the capacity."""


@dataclass(frozen=True)
class Price:
    """The gain in score when one limit is relaxed.

    Attributes:
        step: increase of the capacity, in the limit's unit.
        gain: decrease of the best score with this step; 0 if the limit does not bind.
        most: decrease of the best score without the limit.
    """

    limit: Limit
    step: float
    gain: float
    most: float


def prices(
    problem: Problem,
    solution: Solution,
    *,
    steps: Mapping[str, float] | None = None,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
) -> list[Price]:
    """The price of every limit, in their order: one solve without the limit, and one with the step if the limit binds.

    A gain is the difference of two searches. A gain below `relative_gap` of the cost of all limits counts as 0.

    Args:
        solution: the best of the problem.
        steps: by limit name, in its unit; RELATIVE_STEP of the capacity for other limits.
        time_limit_s: for each solve; when it ends, the best solution until then gives the gain.

    Raises:
        SpecError: a step names no limit, or is not above 0.
        TimeLimitError: never, since each solve starts from `solution`.
    """
    sizes = {limit.name: RELATIVE_STEP * abs(limit.capacity) or RELATIVE_STEP for limit in problem.limits} | dict(
        steps or {}
    )
    wrong = [name for name, step in sizes.items() if step <= 0.0 or name not in solution.used]
    if wrong:
        raise SpecError(
            f"a price needs a step above 0 for a known limit, got {sizes[wrong[0]]} for {wrong[0]!r} "
            f"(limits: {', '.join(solution.used) or 'none'})"
        )

    least = math.fsum(float(values.min()) for values in problem.score)
    noise = relative_gap * (solution.objective - least)

    def gain(relaxed: Problem) -> float:
        better = solve(relaxed, time_limit_s=time_limit_s, relative_gap=relative_gap, start=solution.choice)
        gained = solution.objective - better.objective
        return gained if gained > noise else 0.0

    results = []
    for limit in problem.limits:
        step = sizes[limit.name]
        most = gain(problem.with_limits(other for other in problem.limits if other is not limit))
        more = gain(problem.with_capacity(limit.name, limit.capacity + step)) if most else 0.0
        results.append(Price(limit, step, more, most))
    return results
