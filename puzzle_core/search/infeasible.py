"""Why no architecture meets the limits: the fewest limits that cannot hold together, and what each of them could be.

METHOD section 6 and DESIGN rule 5: an infeasible search says what was asked, what can be reached, and what to do.
"""

import math
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np

from puzzle_core.errors import InfeasibleError, TimeLimitError
from puzzle_core.search.highs import minimise
from puzzle_core.search.problem import Limit, Problem


@dataclass(frozen=True)
class Conflict:
    """One of the limits that cannot hold together.

    Attributes:
        limit: what was asked.
        least: the least capacity with which the problem has an answer, every other limit held; None if none was found.
        least_alone: the least use with no other limit.
    """

    limit: Limit
    least: float | None
    least_alone: float


def explain_infeasible(problem: Problem, *, time_limit_s: float = 60.0) -> InfeasibleError:
    """The error to raise for a problem known to have no answer; its attribute `conflicts` is a tuple of Conflict.

    Sets of the K limits are tried from the smallest on: up to 2**K solves, each of `time_limit_s` at most.
    """
    limits = problem.limits
    smaller = chain.from_iterable(combinations(limits, size) for size in range(1, len(limits)))
    together = next((group for group in smaller if _impossible(problem.with_limits(group), time_limit_s)), limits)
    conflicts = tuple(_conflict(problem, limit, time_limit_s) for limit in together)
    error = InfeasibleError(_text(conflicts))
    error.conflicts = conflicts
    return error


def _impossible(problem: Problem, time_limit_s: float) -> bool:
    """Whether it is proved that the limits cannot hold together."""
    nothing = tuple(np.zeros_like(values) for values in problem.score)
    try:
        return minimise(problem, nothing, time_limit_s=time_limit_s) is None
    except TimeLimitError:
        return False


def _conflict(problem: Problem, limit: Limit, time_limit_s: float) -> Conflict:
    others = problem.with_limits(other for other in problem.limits if other != limit)
    alone = math.fsum(float(values.min()) for values in problem.resources[limit.resource])
    return Conflict(limit, _least_use(others, limit.resource, time_limit_s), alone)


def _least_use(problem: Problem, resource: str, time_limit_s: float) -> float | None:
    try:
        found = minimise(problem, problem.resources[resource], time_limit_s=time_limit_s)
    except TimeLimitError:
        return None
    return None if found is None else problem.total(resource, found.choice)


def _text(conflicts: tuple[Conflict, ...]) -> str:
    names = " and ".join(conflict.limit.name for conflict in conflicts)
    head = f"no architecture meets the limit {names}" if len(conflicts) == 1 else f"{names} cannot hold together"
    lines = [f"{head} (capacities of the layers alone, fixed costs taken off):"]
    for conflict in conflicts:
        limit = conflict.limit
        line = f"  {limit.name}: asked at most {_number(limit.capacity)} {limit.unit}; the least within reach is "
        if conflict.least != conflict.least_alone:
            line += f"{_number(conflict.least_alone)} {limit.unit} alone, and with the other limits held "
        if conflict.least is None:
            line += "none was found: they may not hold together even without it"
        else:
            line += f"{_number(conflict.least)} {limit.unit}"
        lines.append(line)
    lines.append("Raise one of these limits to the least within reach, or add cheaper variants to the library.")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Twelve digits: few enough to read, and close enough that the printed value, asked for as a limit, can be met."""
    return f"{value:,.12g}"
