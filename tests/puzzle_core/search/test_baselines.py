"""Baselines do what METHOD section 8 says, within the limits, and say so when they fail."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError, SpecError
from puzzle_core.search.baselines import greedy, maximise, random_choice, uniform
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem


def of_memory(pair: Problem, capacity: float) -> Problem:
    return pair.with_limits([Limit("memory", "bytes", capacity, "GB")])


def test_greedy_by_hand_rolls_over_what_is_left(pair: Problem) -> None:
    """Means 2 and 5/3: layer 1 goes first. Of 16 GB it may take 8, so `half`; with the 2 GB left, layer 0 has 10."""
    solution = greedy(of_memory(pair, 16.0))
    assert (solution.choice, solution.objective, solution.method) == ((0, 1), 2.0, "greedy")
    assert solve(of_memory(pair, 16.0)).objective == 1.0, "the exact search knows which layer minds less"


def test_greedy_takes_the_smallest_overdraft_and_the_deficit_rolls(pair: Problem) -> None:
    """Layer 1 has no option of 3 GB or less: `fat` (4 GB) overdraws least, and layer 0 makes up for it."""
    problem = replace(of_memory(pair, 6.0), resources={"bytes": (np.array([3.0, 2.5, 2.0]), np.array([9.0, 4.0, 8.0]))})
    assert greedy(problem).choice == (2, 1)


def test_greedy_says_when_it_ends_outside_the_limits(pair: Problem) -> None:
    """Layer 1 is served first and spends all of its share; layer 0 then has nothing small enough."""
    problem = replace(
        of_memory(pair, 10.0), resources={"bytes": (np.array([7.0, 8.0, 9.0]), np.array([5.0, 4.0, 3.0]))}
    )
    with pytest.raises(InfeasibleError, match=r"memory 12 of 10 GB.*exact search"):
        greedy(problem)
    assert solve(problem).choice == (0, 2)


def test_uniform_takes_the_best_shared_option_that_fits(pair: Problem) -> None:
    assert uniform(of_memory(pair, 19.0)).options == ("half", "half")
    assert uniform(of_memory(pair, 11.0)).options == ("none", "none")
    only_first = replace(of_memory(pair, 19.0), options=(("full", "half", "none"), ("full", "other", "none")))
    assert uniform(only_first).options == ("none", "none")
    with pytest.raises(InfeasibleError, match="no option taken in every layer"):
        uniform(of_memory(pair, 2.0))


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_maximise_equals_brute_force(seed: int, random_problem: Callable, every_choice: Callable) -> None:
    problem = random_problem(seed, limits=2, layers=4)
    most = max((problem.total("bytes", c) for c in every_choice(problem) if problem.feasible(c)), default=None)
    if most is None:
        with pytest.raises(InfeasibleError, match="limit"):
            maximise(problem, "bytes")
    else:
        solution = maximise(problem, "bytes")
        assert problem.total("bytes", solution.choice) == pytest.approx(most, rel=1e-6)
        assert solution.objective == problem.total_score(solution.choice)
        assert not solution.optimal or solution.gap == 0.0


def test_maximise_refuses_an_unknown_resource(pair: Problem) -> None:
    with pytest.raises(SpecError, match=r"no resource 'byte'.*bytes, ms"):
        maximise(pair, "byte")


def test_random_fits_and_leaves_no_room(random_problem: Callable, every_choice: Callable) -> None:
    found = 0
    for seed in range(1100, 1130):
        problem = random_problem(seed, limits=2, layers=5)
        try:
            solution = random_choice(problem, seed)
        except InfeasibleError:
            continue
        found += 1
        assert problem.feasible(solution.choice)
        for choice in every_choice(problem):
            changed = [a != b for a, b in zip(choice, solution.choice, strict=True)]
            dearer = all(problem.total(limit.resource, choice) > solution.used[limit.name] for limit in problem.limits)
            if sum(changed) == 1 and dearer:
                assert not problem.feasible(choice), "a dearer option still fits"
    assert found >= 15


def test_random_depends_on_the_seed_alone(random_problem: Callable) -> None:
    problem = random_problem(1200, limits=1, layers=20)
    choices = [random_choice(problem, seed).choice for seed in range(8)]
    assert choices == [random_choice(problem, seed).choice for seed in range(8)]
    assert len(set(choices)) == 8
    worse = replace(problem, score=tuple(values[::-1] for values in problem.score))
    assert choices[0] == random_choice(worse, 0).choice, "scores must not be looked at"


def test_random_says_when_it_is_stuck(pair: Problem) -> None:
    with pytest.raises(InfeasibleError, match="memory 3 of 2 GB"):
        random_choice(of_memory(pair, 2.0), 0)


def test_without_limits_every_search_is_defined(pair: Problem) -> None:
    assert greedy(pair).choice == uniform(pair).choice == solve(pair).choice == random_choice(pair, 0).choice == (0, 0)
