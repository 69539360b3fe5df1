"""The exact search against brute force, at every scale, with and without choices to avoid."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError, SolveLimitError, SpecError
from puzzle_core.search import highs
from puzzle_core.search.baselines import greedy, maximise, random_choice, uniform
from puzzle_core.search.effort import Effort
from puzzle_core.search.mip import solve, solve_diverse
from puzzle_core.search.problem import Limit, Problem
from tests.puzzle_core.search.conftest import in_other_units

SEEDS = range(120)


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_brute_force(seed: int, random_problem: Callable, brute_force: Callable) -> None:
    problem = random_problem(seed)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve(problem)
    else:
        solution = solve(problem)
        assert solution.optimal
        assert solution.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert solution.bound <= solution.objective


def test_the_random_problems_can_tell_right_from_wrong(random_problem: Callable, brute_force: Callable) -> None:
    """Planted faults: a search without its limits, or with its layers shuffled, would not equal brute force."""
    problems = [random_problem(seed) for seed in SEEDS]
    best = [brute_force(problem) for problem in problems]
    unlimited = [brute_force(problem.with_limits([])) for problem in problems]
    turned = [brute_force(replace(problem, score=_turned(problem))) for problem in problems]
    assert sum(value is None for value in best) >= 15
    assert sum(value is not None and value > free + 0.01 for value, free in zip(best, unlimited, strict=True)) >= 40
    assert sum(value != other for value, other in zip(best, turned, strict=True)) >= 40
    assert {len(problem.limits) for problem in problems} == {1, 2, 3}


def _turned(problem: Problem) -> tuple[np.ndarray, ...]:
    return tuple(values[::-1] for values in problem.score)


@pytest.mark.parametrize("seed", range(200, 210))
def test_relaxing_a_limit_never_hurts(seed: int, random_problem: Callable) -> None:
    problem = random_problem(seed, limits=2, layers=5)
    first, second = problem.limits
    reached = math.inf
    for capacity in np.linspace(0.2, 1.0, 5) * sum(values.max() for values in problem.resources[first.resource]):
        try:
            objective = solve(problem.with_limits([replace(first, capacity=float(capacity)), second])).objective
        except InfeasibleError:
            assert reached == math.inf, "a looser limit made it infeasible"
            continue
        assert objective <= reached + 1e-12
        reached = objective


@pytest.mark.parametrize("seed", range(300, 312))
def test_never_worse_than_a_baseline(seed: int, random_problem: Callable) -> None:
    problem = random_problem(seed, limits=2, layers=5)
    searches = [
        greedy,
        uniform,
        lambda p: maximise(p, "bytes"),
        *(lambda p, s=s: random_choice(p, s) for s in range(3)),
    ]
    for search in searches:
        try:
            other = search(problem)
        except InfeasibleError:
            continue
        assert solve(problem).objective <= other.objective + 1e-12


def _with_room(problem: Problem, share: float) -> Problem:
    """Every capacity this share of the way from the least use to the largest."""
    capacities = [
        sum(float(x.min() + share * (x.max() - x.min())) for x in problem.resources[limit.resource])
        for limit in problem.limits
    ]
    return problem.with_limits(
        replace(limit, capacity=capacity) for limit, capacity in zip(problem.limits, capacities, strict=True)
    )


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_units_do_not_matter(seed: int, random_problem: Callable) -> None:
    """Scores from 1e-6 to 1e6 and costs in any unit give the same architecture."""
    problem = _with_room(random_problem(seed, limits=3, layers=5), 0.6)
    expected = solve(problem).choice
    for other in in_other_units(problem):
        assert solve(other).choice == expected


def test_one_disastrous_option_does_not_blur_the_others(random_problem: Callable, brute_force: Callable) -> None:
    """Scores that differ by 1e-7 beside one of 1e6: thirteen orders, more than the solver's own tolerance bridges."""
    wrong = []
    for peaked in (highs.PEAKED, math.inf):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(highs, "PEAKED", peaked)
            problems = [_with_a_disaster(random_problem(seed, limits=1, layers=5)) for seed in range(400, 430, 2)]
            feasible = [problem for problem in problems if brute_force(problem) is not None]
            wrong.append(sum(solve(p).objective > 1.0001 * brute_force(p) for p in feasible))
    assert wrong[0] == 0
    assert wrong[1] > 0, "planted fault: solved at the scale of the largest score alone, some of these go wrong"


def _with_a_disaster(problem: Problem) -> Problem:
    score = [values * 1e-7 for values in problem.score]
    widest = max(range(len(score)), key=lambda layer: score[layer].size)
    score[widest][-1] = 1e6
    return replace(problem, score=tuple(score))


def test_capacity_met_exactly_is_met(pair: Problem) -> None:
    tenths = tuple(np.array([0.1, 0.2, 0.3]) for _ in range(2))
    problem = replace(pair, resources={"ms": tenths}, limits=(Limit("latency", "ms", 0.3, "ms"),))
    assert problem.total("ms", (0, 1)) > 0.3, "rounding puts it above, by one unit in the last place"
    assert solve(replace(problem, score=(np.array([1.0, 1.0, 1.0]), np.array([9.0, 0.0, 0.0])))).choice == (0, 1)


def test_negative_scores_and_uses(pair: Problem) -> None:
    problem = replace(
        pair,
        score=(np.array([0.0, -1.0, 5.0]), np.array([0.0, 2.0, -3.0])),
        resources={"ms": (np.array([-1.0, 3.0, 0.0]), np.array([0.0, 0.0, 2.0]))},
        limits=(Limit("latency", "ms", 1.0, "ms"),),
    )
    solution = solve(problem)
    assert (solution.choice, solution.objective, solution.slack) == ((0, 2), -3.0, {"latency": 0.0})


@pytest.mark.parametrize("seed", range(500, 530))
def test_avoiding_earlier_choices_equals_brute_force(
    seed: int, random_problem: Callable, brute_force: Callable
) -> None:
    problem = random_problem(seed, limits=1, layers=4, options=4)
    problem = problem.with_limits(replace(limit, capacity=limit.capacity + 1.0) for limit in problem.limits)
    avoid = [(solve(problem).choice, 2), (problem.parent, 1)]
    best = brute_force(problem, avoid)
    if best is None:
        with pytest.raises(InfeasibleError, match="layers shared with solution"):
            solve(problem, avoid=avoid)
    else:
        solution = solve(problem, avoid=avoid)
        assert solution.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert set(solution.used) == {limit.name for limit in problem.limits}


def test_diverse_solutions_differ_and_each_is_the_best_left(random_problem: Callable, brute_force: Callable) -> None:
    problem = random_problem(602, limits=2, layers=5, options=5)
    found = solve_diverse(problem, 4, alpha=0.5)
    assert len(found) == 4
    for number, solution in enumerate(found):
        earlier = [(other.choice, 2) for other in found[:number]]
        for choice, shared in earlier:
            assert sum(a == b for a, b in zip(choice, solution.choice, strict=True)) <= shared
        assert solution.objective == pytest.approx(brute_force(problem, earlier), rel=1e-6)
    assert found[-1].objective > found[0].objective


def test_diverse_search_stops_when_no_more_exist(pair: Problem) -> None:
    assert len(solve_diverse(pair, 10, alpha=0.0)) == 3, "three options a layer, none of them twice"
    assert len(solve_diverse(pair, 10, alpha=0.5)) == 9, "all of them"


def test_diverse_search_raises_when_none_exists_and_for_a_bad_alpha(pair: Problem) -> None:
    with pytest.raises(InfeasibleError, match="latency"):
        solve_diverse(pair.with_limits([Limit("latency", "ms", 1.0, "ms")]), 3)
    with pytest.raises(SpecError, match="alpha"):
        solve_diverse(pair, 3, alpha=1.0)


def test_shared_layers_are_floored_as_written() -> None:
    """0.29 * 100 is 28.999999999999996 in binary; the spec says 29."""
    score = tuple(np.random.default_rng(0).random((100, 2)))
    first, second = solve_diverse(Problem((("a", "b"),) * 100, score, (0,) * 100, {}), 2, alpha=0.29)
    assert sum(a == b for a, b in zip(first.choice, second.choice, strict=True)) == 29


def _large(layers: int = 80) -> Problem:
    """80 layers of 54 options with three limits at 60 % of the parent, the first layer a hundred times as fragile."""
    random = np.random.default_rng(7)
    attention, ffn = np.meshgrid([1.0, 0.5, 0.25, 0.12, 0.05, 0.0], np.linspace(1.0, 0.0, 9), indexing="ij")
    weight = (0.2 * attention + 0.8 * ffn).ravel()
    score, memory, time = [], [], []
    for layer in range(layers):
        fragile = np.exp(random.normal()) * (100.0 if layer == 0 else 1.0)
        score.append(1e-3 * fragile * (1.0 - weight) * random.uniform(0.7, 1.3, weight.size))
        memory.append(1e9 * weight + 5e8 * attention.ravel())
        time.append((0.5 * attention + 0.5 * ffn).ravel() * random.uniform(0.95, 1.05, weight.size))
    columns = {"bytes": [1e9 * weight] * layers, "memory": memory, "ms": time}
    limits = tuple(Limit(n, n, 0.6 * sum(float(x[0]) for x in column), n) for n, column in columns.items())
    ids = tuple(f"v{index}" for index in range(weight.size))
    return Problem((ids,) * layers, tuple(score), (0,) * layers, {n: tuple(c) for n, c in columns.items()}, limits)


def test_80_layers_of_54_options_are_solved_to_optimality() -> None:
    problem = _large()
    solution = solve(problem)
    assert solution.optimal
    assert solution.gap <= 1e-6
    assert problem.feasible(solution.choice)
    assert solution.objective < greedy(problem).objective


def test_a_time_limit_is_honest_and_says_that_it_was_met() -> None:
    problem, effort = _large(), Effort(seconds=0.0)
    with pytest.raises(SolveLimitError, match="20,000 nodes or 0 s"):
        solve(problem, effort=effort)
    assert effort.met_time_limit
    start = greedy(problem).choice
    stopped = solve(problem, effort=effort, start=start)
    assert not stopped.optimal
    assert stopped.gap > 0.01
    assert stopped.objective <= problem.total_score(start)
    unlimited = Effort()
    assert stopped.bound <= solve(problem, effort=unlimited).objective
    assert not unlimited.met_time_limit


def test_nodes_end_a_solve_at_the_same_choice_in_every_run() -> None:
    """All layers alike but for noise in one resource: a hard knapsack, which one node does not prove."""
    problem = _large()
    first, second = (solve(problem, effort=Effort(nodes=1), relative_gap=0.0) for _ in range(2))
    assert not first.optimal
    assert (first.choice, first.bound) == (second.choice, second.bound)
    assert solve(problem).bound >= first.bound - 1e-12
