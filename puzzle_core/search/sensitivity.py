"""What one more unit of each limit would buy: the exact search again, with a little more room."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from puzzle_core.errors import SpecError
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem, Solution

STEP = 0.01
"""How far a capacity is relaxed, as a part of it, where the caller names no step."""


@dataclass(frozen=True)
class Price:
    """What more room in one limit buys.

    Attributes:
        step: by how much the capacity was relaxed, in the limit's unit.
        gain: by how much the best score falls with it; 0 where the limit does not matter.
        most: by how much it would fall without the limit.
    """

    limit: Limit
    step: float
    gain: float
    most: float

    @property
    def gain_per_unit(self) -> float:
        """Gain by unit of the limit, an average over the step: the trade-off is a staircase."""
        return self.gain / self.step


def prices(
    problem: Problem,
    solution: Solution,
    *,
    steps: Mapping[str, float] | None = None,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
) -> list[Price]:
    """The price of every limit, in their order: one solve without the limit, and one with more room where that helps.

    Gains are differences of two searches: one below `relative_gap` of what the limits cost counts as none.

    Args:
        solution: the best of the problem.
        steps: by limit name, in its unit; otherwise STEP of the capacity.
        time_limit_s: for each solve; when it ends, the gain is what was found by then.

    Raises:
        SpecError: a step is for no limit, or not above 0.
        TimeLimitError: never without a choice, since `solution` is one.
    """
    sizes = {limit.name: STEP * abs(limit.capacity) or STEP for limit in problem.limits} | dict(steps or {})
    wrong = [name for name, step in sizes.items() if step <= 0.0 or name not in solution.used]
    if wrong:
        raise SpecError(
            f"a price needs a step above 0 for a limit that is there, got {sizes[wrong[0]]} for {wrong[0]!r} "
            f"(limits: {', '.join(solution.used) or 'none'})"
        )

    least = math.fsum(float(values.min()) for values in problem.score)
    noise = relative_gap * (solution.objective - least)

    def gain(relaxed: Problem) -> float:
        better = solve(relaxed, time_limit_s=time_limit_s, relative_gap=relative_gap, start=solution.choice)
        gained = solution.objective - better.objective
        return gained if gained > noise else 0.0

    found = []
    for limit in problem.limits:
        step = sizes[limit.name]
        most = gain(problem.with_limits(other for other in problem.limits if other is not limit))
        more = gain(problem.with_capacity(limit.name, limit.capacity + step)) if most else 0.0
        found.append(Price(limit, step, more, most))
    return found
