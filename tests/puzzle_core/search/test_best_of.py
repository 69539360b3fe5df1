"""The best over several problems is the best of solving each, whatever was left out on the way."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError, SolveLimitError, SpecError
from puzzle_core.search import best_of
from puzzle_core.search.best_of import solve_best
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem


def batches(problem: Problem, seed: int, count: int = 6) -> dict[int, Problem]:
    """The same scores and rules at other resources and capacities."""
    random = np.random.default_rng(seed)
    return {
        2**number: replace(
            problem,
            resources={
                name: tuple(values * random.uniform(0.7, 1.4) for values in column)
                for name, column in problem.resources.items()
            },
            limits=tuple(
                replace(limit, capacity=limit.capacity * random.uniform(0.7, 1.4)) for limit in problem.limits
            ),
        )
        for number in range(count)
    }


def test_equals_solving_each(ruled_problem: Callable, brute_force: Callable) -> None:
    left_out = infeasible = 0
    for seed in range(4000, 4060):
        problems = batches(ruled_problem(seed, layers=4), seed)
        each = {key: brute_force(problem) for key, problem in problems.items()}
        if not any(value is not None for value in each.values()):
            with pytest.raises(InfeasibleError, match="none of 6 problems"):
                solve_best(problems)
            continue
        best = solve_best(problems)
        least = min(value for value in each.values() if value is not None)
        assert best.solution.objective == pytest.approx(least, rel=1e-6, abs=1e-9)
        assert best.key == next(key for key, value in each.items() if value is not None and value <= least + 1e-6)
        assert problems[best.key].feasible(best.solution.choice)
        assert best.alternatives[best.key].bound <= best.solution.objective
        assert list(best.alternatives) == list(problems)
        for key, other in best.alternatives.items():
            value = math.inf if each[key] is None else each[key]
            assert other.bound <= value + 1e-9
            assert other.infeasible is None or value == math.inf
            assert other.solution is None or other.solution.objective == pytest.approx(value, rel=1e-6, abs=1e-9)
            left_out += other.solution is None and other.infeasible is None
            infeasible += other.infeasible is not None
    assert left_out >= 50, "most are never solved"
    assert infeasible >= 10


def test_at_a_tie_the_callers_first_wins(pair: Problem) -> None:
    roomy = pair.with_limits([Limit("memory", "bytes", 99.0, "GB")])
    assert solve_best({"b": roomy, "a": pair, "c": roomy}).key == "b"
    tight = pair.with_limits([Limit("memory", "bytes", 16.0, "GB")])
    best = solve_best({1: tight, 2: roomy, 4: pair})
    assert best.key == 2
    assert best.alternatives[1].bound > 0.0
    assert best.alternatives[1].solution is None


def test_every_key_says_why_it_has_no_answer(pair: Problem) -> None:
    tight = pair.with_limits([Limit("memory", "bytes", 2.0, "GB")])
    slow = pair.with_limits([Limit("latency", "ms", 5.0, "ms")])
    with pytest.raises(InfeasibleError) as caught:
        solve_best({1: tight, 8: slow})
    text = str(caught.value)
    assert "1: no architecture meets the limit memory" in text
    assert "8: no architecture meets the limit latency" in text
    assert [conflict.limit.name for conflict in caught.value.conflicts] == ["memory", "latency"]
    best = solve_best({1: tight, 8: pair})
    assert best.key == 8
    assert "memory: asked at most 2 GB" in str(best.alternatives[1].infeasible)


def test_no_problem_is_no_answer() -> None:
    with pytest.raises(SpecError, match="at least one problem"):
        solve_best({})


def test_a_time_limit_is_no_proof(pair: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: object, **named: object) -> None:
        raise SolveLimitError("late")

    tight = pair.with_limits([Limit("memory", "bytes", 16.0, "GB")])
    impossible = pair.with_limits([Limit("memory", "bytes", 2.0, "GB")])
    monkeypatch.setattr(best_of, "solve_or_none", late)
    with pytest.raises(SolveLimitError, match="any of 1, 2, nor a proof that there is none for 1"):
        solve_best({1: tight, 2: impossible})


def test_bounds_of_what_was_left_out_are_below_its_answer(random_problem: Callable) -> None:
    problems = batches(random_problem(4100, limits=2, layers=12), 1, count=12)
    best = solve_best(problems)
    for key, other in best.alternatives.items():
        if other.infeasible is None:
            assert best.solution.objective <= solve(problems[key]).objective * (1 + 1e-6)
            assert other.bound <= solve(problems[key]).objective * (1 + 1e-6)
