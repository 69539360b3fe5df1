"""Why no architecture meets the limits: the fewest that cannot hold together, and what each of them could be.

METHOD section 6 and DESIGN rule 5: an infeasible search says what was asked, what can be reached, and what to do.
"Parts" are the limits and the AtMostDistinct rules of the request. An AllOrNone rule describes the options and always
holds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from puzzle_core.errors import InfeasibleError, SolveLimitError
from puzzle_core.search.effort import BY_NODES, Effort
from puzzle_core.search.highs import minimise
from puzzle_core.search.problem import Choice, Limit, Problem
from puzzle_core.search.rules import UNCOUNTED, AllOrNone, AtMostDistinct

Part = Limit | AtMostDistinct
Parts = frozenset[int]
"""Places of parts in the tuple of all."""
CORRECTIONS = 4
"""Tries to find a smaller set that is impossible, for every part of the request."""


@dataclass(frozen=True)
class Conflict:
    """One of the limits and rules that cannot hold together.

    Attributes:
        limit: what was asked.
        least: the least capacity (number of different groups) with which the problem has an answer, everything else
            held; None if none was found.
        least_alone: the least use (number) with no other limit or rule.
    """

    limit: Part
    least: float | None
    least_alone: float


def explain_infeasible(problem: Problem, *, effort: Effort = BY_NODES) -> InfeasibleError:
    """The error to raise for a problem known to have no answer; its attribute `conflicts` is a tuple of Conflict.

    `effort` holds for each solve; where it ends one, the parts are still such that cannot hold together, and may not be
    the fewest.
    """
    together = _fewest_impossible(problem, _parts(problem), effort)
    conflicts = tuple(_conflict(problem, part, effort) for part in together)
    error = InfeasibleError(_text(conflicts))
    error.conflicts = conflicts
    return error


def _parts(problem: Problem) -> tuple[Part, ...]:
    return (*problem.limits, *(rule for rule in problem.rules if isinstance(rule, AtMostDistinct)))


def _only(problem: Problem, parts: Iterable[Part]) -> Problem:
    """The problem with these parts alone."""
    parts = tuple(parts)
    return replace(
        problem,
        limits=tuple(part for part in parts if isinstance(part, Limit)),
        rules=tuple(rule for rule in problem.rules if isinstance(rule, AllOrNone) or rule in parts),
    )


def _fewest_impossible(problem: Problem, parts: tuple[Part, ...], effort: Effort) -> tuple[Part, ...]:
    """The smallest set of parts that cannot hold together, in about as many solves as there are parts.

    Step 1, the deletion filter: drop each part without which the rest is still impossible. The result is a set that is
    impossible and becomes possible without any of its parts. Step 2, conflicts and corrections: a choice breaks some
    parts (a correction), and every impossible set has a part of each correction. Take the smallest set that hits all
    corrections known so far. Either it is impossible, and no smaller set is; or some choice holds it, and the parts
    that this choice breaks are another correction.
    """
    corrections: list[Parts] = []

    def possible(places: Parts) -> bool:
        """Whether these parts can hold together, as far as the effort tells; notes what the choice breaks."""
        rest = frozenset(range(len(parts))) - places
        try:
            choice = _choice_within(problem, parts, places, effort)
        except SolveLimitError:
            choice = problem.parent
            broken = rest
        else:
            if choice is None:
                return False
            names = problem.broken(choice)
            broken = frozenset(place for place in rest if parts[place].name in names) or rest
        corrections.append(broken)
        return True

    known = frozenset(range(len(parts)))
    for place in reversed(range(len(parts))):
        if not possible(known - {place}):
            known -= {place}
    for _ in range(CORRECTIONS * len(parts)):
        smaller = _smallest_hitting(corrections, len(known) - 1)
        if smaller is None:
            break
        if not possible(smaller):
            known = smaller
            break
    return tuple(parts[place] for place in sorted(known))


def _choice_within(problem: Problem, parts: tuple[Part, ...], places: Parts, effort: Effort) -> Choice | None:
    """A choice that holds these parts, and does not exceed the other limits by much; None when there is none."""
    excess = [np.zeros_like(values) for values in problem.score]
    for place, part in enumerate(parts):
        if isinstance(part, Limit) and place not in places:
            column = problem.resources[part.resource]
            span = math.fsum(float(np.ptp(values)) for values in column) or 1.0
            excess = [sum_J + values / span for sum_J, values in zip(excess, column, strict=True)]
    held = _only(problem, (parts[place] for place in places))
    minimum = minimise(held, tuple(excess), effort=effort, relative_gap=0.1)
    return None if minimum is None else minimum.choice


def _smallest_hitting(sets: Sequence[Parts], largest: int) -> Parts | None:
    """The smallest set of places with one of every set, of at most `largest` places; None when all have more."""
    ordered = sorted(sets, key=len)

    def extended(chosen: Parts, room: int) -> Parts | None:
        unhit = next((places for places in ordered if not places & chosen), None)
        if unhit is None:
            return chosen
        if room == 0:
            return None
        trials = (extended(chosen | {place}, room - 1) for place in sorted(unhit))
        return next((trial for trial in trials if trial is not None), None)

    sizes = (extended(frozenset(), size) for size in range(largest + 1))
    return next((smallest for smallest in sizes if smallest is not None), None)


def _conflict(problem: Problem, part: Part, effort: Effort) -> Conflict:
    others = _only(problem, (other for other in _parts(problem) if other is not part))
    alone = _only(problem, ())
    if isinstance(part, AtMostDistinct):
        counts = [_least_count(within, part, effort) for within in (others, alone)]
    else:
        counts = [_least_use(within, part.resource, effort) for within in (others, alone)]
    least, least_alone = counts
    assert least_alone is not None, "without limits, the parent is a choice"
    return Conflict(part, least, least_alone)


def _least_use(problem: Problem, resource: str, effort: Effort) -> float | None:
    try:
        minimum = minimise(problem, problem.resources[resource], effort=effort)
    except SolveLimitError:
        return None
    return None if minimum is None else problem.total(resource, minimum.choice)


def _least_count(problem: Problem, rule: AtMostDistinct, effort: Effort) -> float | None:
    """The least number of groups that a choice can have, by trying each."""
    nothing = tuple(np.zeros_like(values) for values in problem.score)
    groups = np.setdiff1d(np.concatenate(rule.groups), [UNCOUNTED]).size
    for at_most in range(groups + 1):
        ruled = replace(problem, rules=(*problem.rules, replace(rule, at_most=at_most)))
        try:
            if minimise(ruled, nothing, effort=effort) is not None:
                return float(at_most)
        except SolveLimitError:
            return None
    return None


def _text(conflicts: tuple[Conflict, ...]) -> str:
    names = " and ".join(conflict.limit.name for conflict in conflicts)
    head = f"no architecture meets the limit {names}" if len(conflicts) == 1 else f"{names} cannot hold together"
    lines = [f"{head} (capacities of the layers alone, fixed costs taken off):"]
    for conflict in conflicts:
        part = conflict.limit
        at_most, unit = (part.capacity, part.unit) if isinstance(part, Limit) else (part.at_most, "different")
        line = f"  {part.name}: asked at most {_number(at_most)} {unit}; the least within reach is "
        if conflict.least != conflict.least_alone:
            line += f"{_number(conflict.least_alone)} {unit} alone, and with the other limits held "
        if conflict.least is None:
            line += "none was found: they may not hold together even without it"
        else:
            line += f"{_number(conflict.least)} {unit}"
        lines.append(line)
    lines.append("Raise one of these limits to the least within reach, or add cheaper variants to the library.")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Twelve digits: few enough to read, and close enough that the printed value, asked for as a limit, can be met."""
    return f"{value:,.12g}"
