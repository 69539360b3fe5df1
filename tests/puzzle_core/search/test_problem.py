"""A problem refuses what is broken and says where; its sums, limits and restrictions are right."""

from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import CoverageError, NonFiniteError, SpecError
from puzzle_core.search.problem import Limit, Problem, describe


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_score_names_the_place(pair: Problem, value: float) -> None:
    with pytest.raises(NonFiniteError, match=rf"score of layer 1, option 'half' is {value}"):
        replace(pair, score=(pair.score[0], np.array([0.0, value, 3.0])))


def test_non_finite_resource_names_the_place(pair: Problem) -> None:
    columns = {**pair.resources, "ms": (np.array([1.0, 1.0, np.nan]), pair.resources["ms"][1])}
    with pytest.raises(NonFiniteError, match="ms of layer 0, option 'none' is nan"):
        replace(pair, resources=columns)


def test_non_finite_capacity_names_the_limit(pair: Problem) -> None:
    with pytest.raises(NonFiniteError, match="limit 'memory' is inf"):
        pair.with_limits([Limit("memory", "bytes", np.inf, "GB")])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"options": (("full", "half", "none"), ())}, CoverageError, "layer 1 has no option"),
        ({"options": ()}, CoverageError, "at least one layer"),
        ({"options": (("full", "half", "half"), ("full", "half", "none"))}, SpecError, "layer 0 lists 'half'"),
        ({"score": (np.zeros(3),)}, CoverageError, "score covers 1 layers of 2"),
        ({"score": (np.zeros(3), np.zeros(2))}, CoverageError, r"score of layer 1 has shape \(2,\)"),
        ({"resources": {"ms": (np.zeros(3), np.zeros((3, 1)))}}, CoverageError, "ms of layer 1 has shape"),
        ({"parent": (0,)}, SpecError, "1 parent options"),
        ({"parent": (0, 3)}, SpecError, "layer 1 has 3 options, and its parent index is 3"),
        ({"limits": (Limit("memory", "byte", 1.0, "GB"),)}, SpecError, r"on 'byte'.*known: bytes, ms"),
        ({"limits": (Limit("a", "ms", 1.0, "ms"), Limit("a", "bytes", 1.0, "GB"))}, SpecError, "two limits"),
    ],
)
def test_broken_problems_are_refused(pair: Problem, change: dict[str, object], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        replace(pair, **change)


def test_arrays_cannot_be_changed_from_outside(pair: Problem) -> None:
    mine = np.array([0.0, 1.0, 5.0])
    problem = replace(pair, score=(mine, pair.score[1]))
    mine[0] = np.nan
    assert problem.total_score((0, 0)) == 0.0
    with pytest.raises(ValueError, match="read-only"):
        problem.score[0][0] = 1.0


def test_totals_uses_and_feasibility(pair: Problem) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 12.0, "GB"), Limit("latency", "ms", 7.0, "ms")])
    assert problem.total_score((1, 2)) == 4.0
    assert problem.use((1, 1)) == {"memory": 12.0, "latency": 6.0}
    assert problem.feasible((1, 1))
    assert not problem.feasible((0, 2)), "12 GB fit, 13 ms do not"
    assert problem.with_limits([Limit("memory", "bytes", 12.0 * (1 - 1e-10), "GB")]).feasible((1, 1))
    assert not problem.with_limits([Limit("memory", "bytes", 12.0 * (1 - 1e-8), "GB")]).feasible((1, 1))


def test_restrict_keeps_the_parent_and_its_numbers(pair: Problem) -> None:
    problem = replace(pair, parent=(1, 0)).restrict(lambda layer, option: option == "none" and layer == 0)
    assert problem.options == (("half", "none"), ("full",))
    assert problem.parent == (0, 0)
    assert problem.total_score((1, 0)) == pair.total_score((2, 0))
    assert problem.total("bytes", (0, 0)) == pair.total("bytes", (1, 0))


def test_describe_recomputes_and_refuses_what_does_not_fit(pair: Problem) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 13.0, "GB")])
    solution = describe(problem, (1, 1), method="by hand", seconds=0.0, bound=2.0)
    assert solution.options == ("half", "half")
    assert (solution.objective, solution.bound, solution.optimal) == (3.0, 2.0, False)
    assert solution.gap == pytest.approx(1 / 3)
    assert (solution.used, solution.slack) == ({"memory": 12.0}, {"memory": 1.0})
    with pytest.raises(RuntimeError, match=r"memory 20\.0 of 13\.0 GB"):
        describe(problem, (0, 0), method="by hand", seconds=0.0)
