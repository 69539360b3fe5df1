"""Prices and runners-up: what two exact searches differ by lies in every interval, and small models are exact."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError, SpecError
from puzzle_core.search import sensitivity
from puzzle_core.search.highs import minimise
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem, Solution
from puzzle_core.search.sensitivity import RELATIVE_STEP, explain

ONE = pytest.approx(1.0)


def test_prices_by_hand(pair: Problem) -> None:
    """16 GB: the best is `half` and `full` for 1.0; 4 GB more buy the parent, 1 GB nothing, and 99 ms are enough."""
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB"), Limit("latency", "ms", 99.0, "ms")])
    (memory, latency), _ = explain(problem, solve(problem), steps={"memory": 4.0})
    assert (memory.limit.name, memory.step, memory.at_least, memory.at_most) == ("memory", 4.0, 1.0, 1.0)
    assert (latency.step, latency.at_least, latency.at_most) == (pytest.approx(0.99), 0.0, 0.0)
    (memory, _), _ = explain(problem, solve(problem), steps={"memory": 1.0})
    assert (memory.at_least, memory.at_most) == (0.0, 0.0)


def test_runners_up_by_hand(pair: Problem) -> None:
    """Without `half` in layer 0, `full` and `half` cost 2.0; without `full` in layer 1, too."""
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB")])
    _, (first, second) = explain(problem, solve(problem))
    assert (first.options, first.at_least, first.at_most) == (("full",), ONE, ONE)
    assert (second.options, second.at_least, second.at_most) == (("half",), ONE, ONE)
    tight = pair.with_limits([Limit("memory", "bytes", 3.0, "GB")])
    _, others = explain(tight, solve(tight))
    assert [other.options for other in others] == [(), ()], "nothing else fits"


def solved(make: Callable, seeds: range) -> Iterator[tuple[Problem, Solution]]:
    for seed in seeds:
        problem = make(seed, limits=2, layers=4)
        try:
            yield problem, solve(problem)
        except InfeasibleError:
            continue


@pytest.mark.parametrize("work", [sensitivity.EXACT_WORK, 0])
def test_equal_brute_force_or_hold_it(
    work: int, ruled_problem: Callable, brute_force: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the budget every value is exact, but for what 200 nodes leave; without it, the truth is in the interval."""
    monkeypatch.setattr(sensitivity, "EXACT_WORK", work)
    bought, exact, wide = 0, 0, 0
    for problem, solution in solved(ruled_problem, range(3000, 3040)):
        prices, others = explain(problem, solution, steps={limit.name: 1.0 for limit in problem.limits})
        for price in prices:
            name, capacity = price.limit.name, price.limit.capacity
            gain = solution.objective - brute_force(problem.with_capacity(name, capacity + 1.0))
            assert price.at_least - 1e-6 <= gain <= price.at_most + 1e-6
            bought += gain > 1e-6
        for layer, other in enumerate(others):
            forbidden = tuple(index if place == layer else -1 for place, index in enumerate(solution.choice))
            best = brute_force(problem, [(forbidden, 0)])
            if best is None:
                assert (other.options, other.at_most) == ((), np.inf) if work else other.at_most == np.inf
                continue
            rise = best - solution.objective
            assert other.at_least - 1e-6 <= rise <= other.at_most + 1e-6
            assert solution.options[layer] not in other.options
            assert other.options
            if len(other.options) == 1:
                assert brute_force(_taking(problem, layer, other.options[0])) == pytest.approx(best, abs=1e-6)
            tight = other.at_most - other.at_least <= 2e-3 * other.at_most + 1e-6
            exact, wide = exact + tight, wide + (not tight)
    assert bought >= 10
    assert exact >= (40 if work else 10)
    assert (wide == 0) is (work > 0)


def _taking(problem: Problem, layer: int, option: str) -> Problem:
    """The problem in which a layer must take this option."""
    other = tuple(np.array([float(id_ != option and place == layer) for id_ in ids])
                  for place, ids in enumerate(problem.options))  # fmt: skip
    limit = Limit("must take", "must take", 0.0, "layers")
    return replace(problem, resources={**problem.resources, "must take": other}, limits=(*problem.limits, limit))


def test_a_large_model_is_explained_by_intervals_that_hold_and_name_what_is_certain() -> None:
    """30 layers of 30 options, two limits, of which a third of the layers are searched again exactly."""
    random = np.random.default_rng(5)
    weight = np.linspace(1.0, 0.0, 30)
    score = tuple(1e-3 * np.exp(random.normal()) * (1.0 - weight) * random.uniform(0.7, 1.3, 30) for _ in range(30))
    columns = {name: tuple(weight * random.uniform(0.95, 1.05, 30) for _ in range(30)) for name in ("GB", "ms")}
    limits = tuple(Limit(n, n, 0.6 * sum(float(x[0]) for x in column), n) for n, column in columns.items())
    ids = tuple(f"v{index}" for index in range(30))
    problem = Problem((ids,) * 30, score, (0,) * 30, columns, limits)
    solution = solve(problem)
    prices, others = explain(problem, solution)
    assert (prices, others) == explain(problem, solution), "the same in every run"
    assert any(other.at_most > 1.01 * other.at_least for other in others), "not all of them are exact"
    for layer in range(0, 30, 3):
        forbidden = tuple(index if place == layer else -1 for place, index in enumerate(solution.choice))
        best = minimise(problem.avoiding(forbidden, 0, "without"), score)
        assert best is not None
        rise = best.cost - solution.objective
        assert others[layer].at_least - 1e-9 <= rise <= others[layer].at_most + 1e-9
        assert ids[best.choice[layer]] in others[layer].options


def test_a_capacity_of_nothing_has_a_step(pair: Problem) -> None:
    free = replace(pair, resources={"ms": tuple(values * 0.0 for values in pair.score)})
    problem = free.with_limits([Limit("latency", "ms", 0.0, "ms")])
    ((price,), _) = explain(problem, solve(problem))
    assert (price.step, price.at_most) == (RELATIVE_STEP, 0.0)


@pytest.mark.parametrize("steps", [{"memory": 0.0}, {"memory": -1.0}, {"memroy": 1.0}])
def test_what_cannot_be_asked(pair: Problem, steps: dict[str, float]) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB")])
    with pytest.raises(SpecError, match=r"a step above 0 for a known limit.*limits: memory"):
        explain(problem, solve(problem), steps=steps)
