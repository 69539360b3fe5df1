"""The price of a limit is the difference of two exact searches."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from puzzle_core.errors import InfeasibleError, SpecError
from puzzle_core.search import sensitivity as module
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem
from puzzle_core.search.sensitivity import RELATIVE_STEP, prices


def test_by_hand(pair: Problem) -> None:
    """16 GB: the best is `half` and `full` for 1.0; 4 GB more buy the parent, 1 GB nothing, and 99 ms are enough."""
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB"), Limit("latency", "ms", 99.0, "ms")])
    memory, latency = prices(problem, solve(problem), steps={"memory": 4.0})
    assert (memory.limit.name, memory.step, memory.gain, memory.most) == ("memory", 4.0, 1.0, 1.0)
    assert (latency.step, latency.gain, latency.most) == (pytest.approx(0.99), 0.0, 0.0)
    memory, _ = prices(problem, solve(problem), steps={"memory": 1.0})
    assert (memory.gain, memory.most) == (0.0, 1.0)


def test_equal_brute_force(ruled_problem: Callable, brute_force: Callable) -> None:
    bought = 0
    for seed in range(3000, 3040):
        problem = ruled_problem(seed, limits=2, layers=4)
        try:
            solution = solve(problem)
        except InfeasibleError:
            continue
        for price in prices(problem, solution, steps={limit.name: 1.0 for limit in problem.limits}):
            name, capacity = price.limit.name, price.limit.capacity
            more = brute_force(problem.with_capacity(name, capacity + 1.0))
            most = brute_force(problem.with_limits(limit for limit in problem.limits if limit.name != name))
            assert solution.objective - price.gain == pytest.approx(more, rel=1e-6, abs=1e-6)
            assert solution.objective - price.most == pytest.approx(most, rel=1e-6, abs=1e-6)
            assert 0.0 <= price.gain <= price.most + 1e-9
            bought += price.gain > 0.0
    assert bought >= 10


def test_a_limit_that_does_not_bind_takes_one_solve(pair: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB"), Limit("latency", "ms", 99.0, "ms")])
    solution, solved = solve(problem), []
    monkeypatch.setattr(module, "solve", lambda *args, **named: solved.append(1) or solve(*args, **named))
    found = prices(problem, solution)
    assert len(solved) == 3, "memory without and with more room, latency without"
    assert [price.step for price in found] == pytest.approx([16 * RELATIVE_STEP, 99 * RELATIVE_STEP])


def test_a_capacity_of_nothing_has_a_step(pair: Problem) -> None:
    free = replace(pair, resources={"ms": tuple(values * 0.0 for values in pair.score)})
    problem = free.with_limits([Limit("latency", "ms", 0.0, "ms")])
    (price,) = prices(problem, solve(problem))
    assert (price.step, price.gain) == (RELATIVE_STEP, 0.0)


@pytest.mark.parametrize("steps", [{"memory": 0.0}, {"memory": -1.0}, {"memroy": 1.0}])
def test_what_cannot_be_asked(pair: Problem, steps: dict[str, float]) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB")])
    with pytest.raises(SpecError, match=r"a step above 0 for a known limit.*limits: memory"):
        prices(problem, solve(problem), steps=steps)
