"""The same search written a second time, as plainly as it can be, for another solver interface (scipy's).

Nothing of puzzle_core.search but the problem's own numbers: no scaling, no pruning, weak indicator rows.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from puzzle_core.search.problem import Choice, Problem
from puzzle_core.search.rules import AllOrNone, AtMostDistinct


def solve_plainly(problem: Problem, avoid: Sequence[tuple[Choice, int]] = ()) -> float | None:
    """The least total score, or None when there is no choice."""
    place = {}
    for layer, ids in enumerate(problem.options):
        for option in range(len(ids)):
            place[layer, option] = len(place)
    distinct = [rule for rule in problem.rules if isinstance(rule, AtMostDistinct)]
    for number, rule in enumerate(distinct):
        for group in sorted({int(group) for groups in rule.groups for group in groups} - {-1}):
            place[f"rule {number}", group] = len(place)
    rows, lower, upper = [], [], []

    def add(entries: dict[tuple[int | str, int], float], least: float, most: float) -> None:
        row = np.zeros(len(place))
        for key, value in entries.items():
            row[place[key]] = value
        rows.append(row)
        lower.append(least)
        upper.append(most)

    x = [(layer, option) for layer, ids in enumerate(problem.options) for option in range(len(ids))]
    for layer in range(len(problem.options)):
        add({key: 1.0 for key in x if key[0] == layer}, 1.0, 1.0)
    for limit in problem.limits:
        column = problem.resources[limit.resource]
        add({(i, j): float(column[i][j]) for i, j in x}, -np.inf, limit.capacity + 5e-10 * abs(limit.capacity))
    for number, rule in enumerate(distinct):
        name = f"rule {number}"
        for i, j in x:
            if rule.groups[i][j] >= 0:
                add({(i, j): 1.0, (name, int(rule.groups[i][j])): -1.0}, -np.inf, 0.0)
        add({key: 1.0 for key in place if key[0] == name}, -np.inf, rule.at_most)
    for rule in problem.rules:
        if isinstance(rule, AllOrNone):
            for member in rule.members[1:]:
                add({rule.members[0]: 1.0, member: -1.0}, 0.0, 0.0)
    for choice, shared in avoid:
        add({(i, j): 1.0 for i, j in enumerate(choice) if j >= 0}, -np.inf, shared)
    cost = np.zeros(len(place))
    for i, j in x:
        cost[place[i, j]] = problem.score[i][j]
    result = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), lower, upper),
        integrality=np.ones(len(place)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    return float(result.fun) if result.status == 0 else None
