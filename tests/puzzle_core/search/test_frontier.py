"""A frontier is the exact search at each of its capacities."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError, SpecError
from puzzle_core.search.frontier import frontier
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem


def moved(problem: Problem, name: str, capacity: float) -> Problem:
    return problem.with_limits(
        replace(limit, capacity=capacity) if limit.name == name else limit for limit in problem.limits
    )


def test_by_hand(pair: Problem) -> None:
    """From 3 GB (none, none) to 20 GB (the parent), at 3, 7.25, 11.5, 15.75 and 20 GB; at 15.75 two choices tie."""
    found = frontier(pair.with_limits([Limit("memory", "bytes", 1.0, "GB")]), "memory", 5)
    assert [solution.objective for solution in found] == [8.0, 7.0, 4.0, 3.0, 0.0]
    assert [solution.choice for solution in found[:3]] == [(2, 2), (2, 1), (1, 2)]
    assert found[-1].choice == pair.parent


@pytest.mark.parametrize("seed", range(1300, 1312))
def test_monotone_and_equal_to_independent_solves(seed: int, random_problem: Callable, brute_force: Callable) -> None:
    problem = random_problem(seed, limits=2, layers=5)
    name, other = (limit.name for limit in problem.limits)
    problem = moved(problem, other, problem.limits[1].capacity + 1.0)
    found = frontier(problem, name, 7)
    objectives = [solution.objective for solution in found]
    assert objectives == sorted(objectives, reverse=True)
    assert len(set(objectives)) == len(objectives)
    for solution in found:
        alone = moved(problem, name, solution.used[name] + solution.slack[name])
        assert solution.objective == pytest.approx(brute_force(alone), rel=1e-6, abs=1e-12)
        assert solution.objective == pytest.approx(solve(alone).objective, rel=1e-6, abs=1e-12)
    unlimited = problem.with_limits(limit for limit in problem.limits if limit.name != name)
    assert objectives[-1] == pytest.approx(solve(unlimited).objective, rel=1e-6, abs=1e-12)


def test_no_capacity_between_is_better_than_its_neighbours_allow(random_problem: Callable) -> None:
    problem = random_problem(1400, limits=1, layers=5)
    name = problem.limits[0].name
    found = frontier(problem, name, 9)
    capacities = [solution.used[name] + solution.slack[name] for solution in found]
    for looser, capacity in zip(found[1:], capacities, strict=False):
        halfway = (capacity + looser.used[name] + looser.slack[name]) / 2
        between = solve(moved(problem, name, halfway)).objective
        assert looser.objective - 1e-9 <= between <= found[0].objective + 1e-9


def test_one_point_when_nothing_is_traded(pair: Problem) -> None:
    problem = replace(pair, score=(np.array([5.0, 1.0, 0.0]), np.array([5.0, 1.0, 0.0])))
    found = frontier(problem.with_limits([Limit("memory", "bytes", 1.0, "GB")]), "memory", 5)
    assert [solution.choice for solution in found] == [(2, 2)]


def test_what_cannot_be_asked(pair: Problem) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 9.0, "GB"), Limit("latency", "ms", 1.0, "ms")])
    with pytest.raises(SpecError, match=r"'memroy' \(memory, latency\)"):
        frontier(problem, "memroy", 3)
    with pytest.raises(SpecError, match="two points"):
        frontier(problem, "memory", 1)
    with pytest.raises(InfeasibleError, match="latency"):
        frontier(problem, "memory", 3)
