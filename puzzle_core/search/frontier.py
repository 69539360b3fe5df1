"""The trade-off of score against one limit (METHOD section 6, solved along a range of capacities).

The sweep goes from the loosest capacity to the tightest. A solution at a looser capacity stays optimal while it is
feasible; otherwise its score is a lower bound at tighter capacities. So most points, and most of several problems,
need no solve.

All solves of a sweep share NODES. A point that is not proven within its share has the best score found and a bound.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np

from puzzle_core.errors import SolveLimitError, SpecError
from puzzle_core.search.best_of import BoundedRace, Key
from puzzle_core.search.effort import BY_NODES, Effort
from puzzle_core.search.highs import lower_bound, minimise
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem, Solution, describe

NODES = 10_000
"""Nodes of branch and bound of all points together."""


@dataclass(frozen=True)
class SweepPoint(Generic[Key]):
    """The best solution over several problems at one point of a sweep, and the key of its problem.

    Bound and proof of the solution hold for all problems.
    """

    key: Key
    solution: Solution


def frontier(
    problem: Problem,
    limit_name: str,
    points: int,
    *,
    effort: Effort = BY_NODES,
    relative_gap: float = 1e-6,
    nodes: int = NODES,
) -> list[Solution]:
    """Best solutions from the tightest to the loosest capacity of one limit, other limits and rules held.

    Capacities are evenly spaced over `capacity_range`; the limit's own capacity does not matter. A capacity
    without a better score than the one before is omitted, unless a better one is not ruled out, so the objective never
    rises along the result, and `used[limit_name] + slack[limit_name]` is the capacity. `effort` holds for each solve,
    and `nodes` for those of all points.

    Raises:
        SpecError: there is no such limit, or `points` is below 2.
        InfeasibleError: as `mip.solve`, for the other limits.
    """
    if points < 2:
        raise SpecError(f"a frontier needs two points or more, got {points}")
    whole = effort.part(effort.nodes)
    share = whole.part(nodes // (points + 2))
    least, most = capacity_range(problem, limit_name, effort=share, relative_gap=relative_gap)
    capacities = [float(capacity) for capacity in np.linspace(least, most, points)]
    left = nodes - whole.spent
    swept = sweep_frontier(
        {"": problem}, limit_name, {"": capacities}, effort=effort, relative_gap=relative_gap, nodes=left
    )
    return [point.solution for point in traded(swept)]


def traded(swept: Sequence[SweepPoint[Key] | None]) -> list[SweepPoint[Key]]:
    """The points with a better score than all tighter ones, and those where a better one is not ruled out."""
    points: list[SweepPoint[Key]] = []
    for point in filter(None, swept):
        before = points[-1].solution.objective if points else np.inf
        least = point.solution.objective if point.solution.optimal else point.solution.bound
        if least < before:
            points.append(point)
    return points


def capacity_range(
    problem: Problem, limit_name: str, *, effort: Effort = BY_NODES, relative_gap: float = 1e-6
) -> tuple[float, float]:
    """The capacities between which a limit matters: the least feasible use, and the use of the optimum without it.

    Where the effort ends without a choice, the ends are the sums of the layers' least and largest uses.

    Raises:
        SpecError: there is no such limit.
        InfeasibleError: as `mip.solve`, for the other limits.
    """
    swept = _limit(problem, limit_name)
    others = problem.with_limits(limit for limit in problem.limits if limit is not swept)
    column = others.resources[swept.resource]
    try:
        tightest = minimise(others, column, effort=effort)
        if tightest is None:
            raise explain_infeasible(others, effort=effort)
        loosest = solve(others, effort=effort, relative_gap=relative_gap)
    except SolveLimitError:
        return math.fsum(float(uses.min()) for uses in column), math.fsum(float(uses.max()) for uses in column)
    least, most = (others.total(swept.resource, choice) for choice in (tightest.choice, loosest.choice))
    return least, max(least, most)


def without_free(problem: Problem, limit_name: str, outside: float) -> Problem:
    """The problem without the choices that use nothing at all of a limit's resource: a model of nothing is no offer.

    Args:
        outside: what the parts outside the layers use; where they use something, no choice is free.

    Raises:
        SpecError: there is no such limit.
    """
    column = problem.resources[_limit(problem, limit_name).resource]
    free = tuple(np.asarray(values == 0.0, dtype=np.float64) for values in column)
    if outside > 0.0 or not all(values.any() for values in free) or all(values.all() for values in free):
        return problem
    name = f"layers without {limit_name}"
    limit = Limit(name, name, float(len(free) - 1), "layers")
    return replace(problem, resources={**problem.resources, name: free}, limits=(*problem.limits, limit))


def sweep_frontier(
    problems: Mapping[Key, Problem],
    limit_name: str,
    capacities: Mapping[Key, Sequence[float]],
    *,
    effort: Effort = BY_NODES,
    relative_gap: float = 1e-6,
    nodes: int = NODES,
) -> list[SweepPoint[Key] | None]:
    """The best over problems that share score and rules, at every point of a sweep of one limit's capacity.

    Args:
        capacities: per problem the capacity at each point, from the tightest to the loosest. They may
            differ between problems at one point (one rate is a different time at each batch size, less a fixed part).
        effort: for each solve. A problem at its end counts with its best solution so far.
        nodes: of all solves together. Every point gets its share of those that looser points left.

    Returns:
        One entry per point, whose score never rises from tight to loose; None if no choice was found. Ties within the
        relative gap go to the first key.

    Raises:
        SpecError: a problem lacks the limit, or its capacities; their numbers differ, or they decrease.
    """
    points = _checked_points(problems, limit_name, capacities)
    best: list[SweepPoint[Key] | None] = [None] * points
    whole = effort.part(effort.nodes)
    looser: dict[Key, Solution] = {}
    bounds = dict.fromkeys(problems, -np.inf)
    for point in reversed(range(points)):
        at_point = {key: problem.with_capacity(limit_name, capacities[key][point]) for key, problem in problems.items()}
        race = BoundedRace(at_point, bounds, whole.part((nodes - whole.spent) // (point + 1)), relative_gap)
        for key, solution in looser.items():
            if at_point[key].feasible(solution.choice):
                race.solutions[key] = _moved(at_point[key], solution, solution.bound, solution.optimal)
        for key in sorted(problems, key=lambda key: bounds[key]):
            if key not in race.solutions and race.may_win(key):
                race.bounds[key] = max(bounds[key], lower_bound(at_point[key], at_point[key].score))
        race.run()
        bounds, looser = race.bounds, {**looser, **race.solutions}
        winner = race.winner()
        if winner is not None:
            best[point] = SweepPoint(winner, race.answer(winner))
    return _falling(problems, limit_name, capacities, best)


def _falling(
    problems: Mapping[Key, Problem],
    limit_name: str,
    capacities: Mapping[Key, Sequence[float]],
    swept: Sequence[SweepPoint[Key] | None],
) -> list[SweepPoint[Key] | None]:
    """The same points, but a solution of a tighter one where that scores better, which a point without proof allows."""
    points: list[SweepPoint[Key] | None] = []
    for number, point in enumerate(swept):
        tighter = points[-1] if points else None
        if tighter and (point is None or tighter.solution.objective < point.solution.objective):
            problem = problems[tighter.key].with_capacity(limit_name, capacities[tighter.key][number])
            bound, optimal = (point.solution.bound, point.solution.optimal) if point else (-np.inf, False)
            point = SweepPoint(tighter.key, _moved(problem, tighter.solution, bound, optimal))
        points.append(point)
    return points


def _moved(problem: Problem, solution: Solution, bound: float, optimal: bool) -> Solution:
    """The same solution for another capacity at which it is feasible."""
    return describe(problem, solution.choice, method=solution.method, seconds=0.0, bound=bound, optimal=optimal)


def _limit(problem: Problem, limit_name: str) -> Limit:
    for limit in problem.limits:
        if limit.name == limit_name:
            return limit
    names = ", ".join(limit.name for limit in problem.limits) or "none"
    raise SpecError(f"there is no limit {limit_name!r} to move ({names})")


def _checked_points(problems: Mapping[Key, Problem], limit_name: str, capacities: Mapping[Key, Sequence[float]]) -> int:
    """The number of points."""
    if not problems or problems.keys() != capacities.keys():
        raise SpecError(f"a sweep needs capacities for every problem: {list(problems)}, got {list(capacities)}")
    for key, problem in problems.items():
        _limit(problem, limit_name)
        if any(after < before for before, after in zip(capacities[key], capacities[key][1:], strict=False)):
            raise SpecError(f"capacities of {key} must go from tightest to loosest, got {list(capacities[key])}")
    sizes = {len(values) for values in capacities.values()}
    if len(sizes) > 1:
        raise SpecError(f"all problems of a sweep need as many points, got {sorted(sizes)}")
    return sizes.pop()
