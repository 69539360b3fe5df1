"""An infeasible search names the fewest limits that cannot hold together, and what each could be."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem

MEMORY = Limit("memory", "bytes", 9.0, "GB")
LATENCY = Limit("latency", "ms", 12.0, "ms")


def test_one_limit_by_hand(pair: Problem) -> None:
    with pytest.raises(InfeasibleError) as caught:
        solve(pair.with_limits([replace(LATENCY, capacity=30.0), replace(MEMORY, capacity=2.5)]))
    text = str(caught.value)
    assert "no architecture meets the limit memory" in text
    assert "memory: asked at most 2.5 GB; the least within reach is 3 GB" in text
    assert "latency" not in text


def test_two_limits_that_hold_alone_but_not_together(pair: Problem) -> None:
    """6 GB need `none` twice, so 18 ms; 12 ms allow it once, so 7 GB."""
    limits = [replace(MEMORY, capacity=6.0), LATENCY]
    for limit in limits:
        solve(pair.with_limits([limit]))
    with pytest.raises(InfeasibleError) as caught:
        solve(pair.with_limits([Limit("loose", "bytes", 99.0, "GB"), *limits]))
    text = str(caught.value)
    assert "memory and latency cannot hold together" in text
    assert (
        "memory: asked at most 6 GB; the least within reach is 3 GB alone, and with the other limits held 7 GB" in text
    )
    assert (
        "latency: asked at most 12 ms; the least within reach is 6 ms alone, and with the other limits held 18 ms"
        in text
    )
    assert "loose" not in text
    assert "Raise one of these limits" in text


def test_hopeless_even_without_the_named_limit(pair: Problem) -> None:
    with pytest.raises(InfeasibleError, match=r"memory: .*3 GB alone.*they may not hold together even without it"):
        solve(pair.with_limits([replace(MEMORY, capacity=2.0), replace(LATENCY, capacity=5.0)]))


def infeasible_problems(random_problem: Callable, brute_force: Callable) -> list[Problem]:
    problems = []
    for seed in range(900, 960):
        problem = random_problem(seed, limits=3, layers=4, options=4)
        problem = problem.with_limits(replace(limit, capacity=limit.capacity * 0.8) for limit in problem.limits)
        if brute_force(problem) is None:
            problems.append(problem)
    return problems


def test_named_limits_and_least_values_equal_brute_force(
    random_problem: Callable, brute_force: Callable, every_choice: Callable
) -> None:
    sizes = set()
    for problem in infeasible_problems(random_problem, brute_force):
        with pytest.raises(InfeasibleError) as caught:
            solve(problem)
        conflicts = caught.value.conflicts
        named = tuple(conflict.limit for conflict in conflicts)
        assert named in smallest_conflicts(problem, brute_force)
        sizes.add(len(named))
        for conflict in conflicts:
            resource = conflict.limit.resource
            others = problem.with_limits(limit for limit in problem.limits if limit != conflict.limit)
            uses = [others.total(resource, choice) for choice in every_choice(others) if others.feasible(choice)]
            assert conflict.least == (pytest.approx(min(uses)) if uses else None)
            assert conflict.least_alone == pytest.approx(sum(values.min() for values in problem.resources[resource]))
            assert f"{conflict.limit.name}: asked at most {conflict.limit.capacity:,.12g}" in str(caught.value)
    assert sizes >= {1, 2}, "both kinds must occur, or the test proves little"


def smallest_conflicts(problem: Problem, brute_force: Callable) -> list[tuple[Limit, ...]]:
    for size in range(1, len(problem.limits) + 1):
        found = [g for g in combinations(problem.limits, size) if brute_force(problem.with_limits(g)) is None]
        if found:
            return found
    raise AssertionError("the problem is feasible")


def test_the_printed_least_value_can_be_asked_for(random_problem: Callable, brute_force: Callable) -> None:
    tried = 0
    for problem in infeasible_problems(random_problem, brute_force):
        with pytest.raises(InfeasibleError) as caught:
            solve(problem)
        for conflict in caught.value.conflicts:
            if conflict.least is not None:
                raised = replace(conflict.limit, capacity=float(f"{conflict.least:.12g}"))
                solve(problem.with_limits(raised if limit == conflict.limit else limit for limit in problem.limits))
                tried += 1
    assert tried >= 10


def test_a_capacity_below_zero_is_explained(pair: Problem) -> None:
    """Fixed costs above the limit leave less than nothing for the layers."""
    with pytest.raises(InfeasibleError, match=r"memory: asked at most -1 GB; the least within reach is 3 GB"):
        solve(pair.with_limits([replace(MEMORY, capacity=-1.0)]))


def test_large_values_are_readable(pair: Problem) -> None:
    columns = {"bytes": tuple(values * 2.0**30 for values in pair.resources["bytes"])}
    with pytest.raises(InfeasibleError, match=r"asked at most 1,073,741,824 bytes; .* 3,221,225,472 bytes"):
        solve(replace(pair, resources=columns, limits=(Limit("memory", "bytes", float(np.ldexp(1, 30)), "bytes"),)))
