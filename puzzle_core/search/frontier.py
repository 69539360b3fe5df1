"""The whole trade-off of score against one limit (METHOD section 6, solved along a range of capacities)."""

from dataclasses import replace

import numpy as np

from puzzle_core.errors import SpecError
from puzzle_core.search.highs import minimise
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Problem, Solution


def frontier(
    problem: Problem,
    limit_name: str,
    points: int,
    *,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
) -> list[Solution]:
    """Best solutions from the tightest to the loosest capacity of one limit, the other limits held.

    Capacities are evenly spaced from the least use that can be reached to what the best choice without the limit uses;
    the limit's own capacity does not matter. A capacity that brings no better score than the one before is left out, so
    the objective falls along the result, and `used[limit_name] + slack[limit_name]` is the capacity. `time_limit_s`
    holds for each solve.

    Raises:
        SpecError: there is no such limit, or fewer than two points are asked for.
        InfeasibleError, TimeLimitError: as `mip.solve`, for the other limits.
    """
    swept = next((limit for limit in problem.limits if limit.name == limit_name), None)
    if swept is None or points < 2:
        names = ", ".join(limit.name for limit in problem.limits) or "none"
        raise SpecError(
            f"a frontier needs two points or more and a limit to move, got {points} and {limit_name!r} ({names})"
        )
    others = problem.with_limits(limit for limit in problem.limits if limit is not swept)
    tightest = minimise(others, others.resources[swept.resource], time_limit_s=time_limit_s)
    if tightest is None:
        raise explain_infeasible(others, time_limit_s=time_limit_s)
    loosest = solve(others, time_limit_s=time_limit_s, relative_gap=relative_gap)
    least, most = (others.total(swept.resource, choice) for choice in (tightest.choice, loosest.choice))

    found: list[Solution] = []
    start = tightest.choice
    for capacity in np.linspace(least, max(least, most), points):
        moved = replace(swept, capacity=float(capacity))
        narrowed = problem.with_limits(moved if limit is swept else limit for limit in problem.limits)
        solution = solve(narrowed, time_limit_s=time_limit_s, relative_gap=relative_gap, start=start)
        if not found or solution.objective < found[-1].objective:
            found.append(solution)
            start = solution.choice
    return found
