"""A frontier is the exact search at each of its capacities."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError, SolveLimitError, SpecError
from puzzle_core.search import best_of
from puzzle_core.search.best_of import solve_best
from puzzle_core.search.effort import Effort
from puzzle_core.search.frontier import capacity_range, frontier, sweep_frontier
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
    with pytest.raises(SpecError, match=r"'memroy' .*\(memory, latency\)"):
        frontier(problem, "memroy", 3)
    with pytest.raises(SpecError, match="two points"):
        frontier(problem, "memory", 1)
    with pytest.raises(InfeasibleError, match="latency"):
        frontier(problem, "memory", 3)


def test_a_sweep_over_problems_equals_the_best_of_each_at_each_point(
    ruled_problem: Callable, brute_force: Callable
) -> None:
    keys = set()
    for seed in range(5000, 5024):
        problem = ruled_problem(seed, limits=2, layers=4)
        name = problem.limits[0].name
        random = np.random.default_rng(seed)
        problems, capacities = {}, {}
        for key in ("small", "middle", "large"):
            columns = {n: tuple(x * random.uniform(0.8, 1.2) for x in c) for n, c in problem.resources.items()}
            problems[key] = replace(problem, resources=columns)
            span = sum(float(values.max()) for values in columns[problem.limits[0].resource])
            capacities[key] = np.linspace(0.1, 1.0, 8) * span * random.uniform(0.9, 1.1)
        found = sweep_frontier(problems, name, capacities)
        assert len(found) == 8
        for number, point in enumerate(found):
            here = {key: moved(value, name, float(capacities[key][number])) for key, value in problems.items()}
            each = {key: value for key, p in here.items() if (value := brute_force(p)) is not None}
            if not each:
                assert point is None
                continue
            assert point is not None
            least = min(each.values())
            assert point.solution.objective == pytest.approx(least, rel=1e-6, abs=1e-9)
            assert here[point.key].feasible(point.solution.choice)
            assert point.key == next(key for key in each if each[key] <= least + 1e-6)
            assert point.key == solve_best(here).key
            keys.add(point.key)
    assert keys == {"small", "middle", "large"}


def test_a_sweep_solves_little_of_what_it_could(random_problem: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(5100, limits=1, layers=10, options=6)
    name = problem.limits[0].name
    least, most = capacity_range(problem, name)
    problems = {
        key: replace(problem, resources={n: tuple(x * (1 + key / 50) for x in c) for n, c in problem.resources.items()})
        for key in range(10)
    }
    solved = []
    solve_or_none = best_of.solve_or_none
    monkeypatch.setattr(best_of, "solve_or_none", lambda *a, **n: solved.append(1) or solve_or_none(*a, **n))
    found = sweep_frontier(problems, name, dict.fromkeys(problems, np.linspace(least, most, 20).tolist()))
    assert all(point is not None for point in found)
    assert {point.key for point in found if point} == {0}, "the cheapest of ten alike"
    assert len(solved) <= 40, "of 200"


def wide(layers: int, options: int) -> Problem:
    """Two limits at 60 % of the parent's use; few options are beaten by another."""
    random = np.random.default_rng(11)
    weight = np.linspace(1.0, 0.0, options)
    score = tuple((1.0 - weight) * np.exp(random.normal()) * random.uniform(0.7, 1.3, options) for _ in range(layers))
    columns = {name: tuple(weight * random.uniform(0.9, 1.1, options) for _ in score) for name in ("GB", "ms")}
    limits = tuple(Limit(n, n, 0.6 * sum(float(x[0]) for x in column), n) for n, column in columns.items())
    return Problem((tuple(f"v{j}" for j in range(options)),) * layers, score, (0,) * layers, columns, limits)


def test_all_points_share_their_nodes_and_one_without_proof_is_an_interval_that_holds() -> None:
    problem = wide(20, 12)
    effort, exact = Effort(), frontier(problem, "ms", 7, nodes=10**6)
    assert all(solution.optimal for solution in exact)
    found = frontier(problem, "ms", 7, effort=effort, nodes=8)
    assert effort.spent <= 8 + 9, "a point has one node at least"
    again = frontier(problem, "ms", 7, nodes=8)
    assert [(point.choice, point.bound) for point in again] == [(point.choice, point.bound) for point in found]
    assert any(not point.optimal for point in found)
    objectives = [point.objective for point in found]
    assert objectives == sorted(objectives, reverse=True)
    for point in found:
        alone = solve(moved(problem, "ms", point.used["ms"] + point.slack["ms"]))
        assert alone.optimal
        assert point.bound - 1e-9 <= alone.objective <= point.objective + 1e-9
        assert point.optimal is False or point.objective == pytest.approx(alone.objective, rel=1e-6)


def test_a_problem_that_is_not_decided_leaves_no_proof_to_the_others(
    pair: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two problems, the better of which ends without a choice."""
    worse = pair.with_limits([Limit("memory", "bytes", 9.0, "GB")])
    better = pair.with_limits([Limit("memory", "bytes", 16.0, "GB")])
    solve_or_none = best_of.solve_or_none

    def give_up(problem: Problem, **settings: object) -> object:
        if problem.limits[0].capacity == 16.0:
            raise SolveLimitError("no nodes left")
        return solve_or_none(problem, **settings)  # type: ignore[arg-type]

    whole = solve_best({"better": better, "worse": worse})
    assert (whole.key, whole.solution.optimal) == ("better", True)
    monkeypatch.setattr(best_of, "solve_or_none", give_up)
    best = solve_best({"better": better, "worse": worse})
    assert (best.key, best.solution.optimal) == ("worse", False)
    assert best.solution.bound <= whole.solution.objective < best.solution.objective
    assert {key: alternative.undecided for key, alternative in best.alternatives.items()} == {
        "better": True,
        "worse": False,
    }


def test_what_cannot_be_swept(pair: Problem) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 9.0, "GB")])
    for capacities, text in (
        ({}, "capacities for every problem"),
        ({1: [2.0, 1.0]}, "from tightest to loosest"),
        ({1: [1.0], 2: [1.0]}, "capacities for every problem"),
    ):
        with pytest.raises(SpecError, match=text):
            sweep_frontier({1: problem}, "memory", capacities)
    with pytest.raises(SpecError, match="as many points"):
        sweep_frontier({1: problem, 2: problem}, "memory", {1: [1.0], 2: [1.0, 2.0]})
    with pytest.raises(SpecError, match="no limit 'latency'"):
        sweep_frontier({1: problem}, "latency", {1: [1.0]})
