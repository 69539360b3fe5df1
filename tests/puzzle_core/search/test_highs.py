"""Options left out before a solve are never missed, and what the solver returns is checked."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.search import highs, milp
from puzzle_core.search.highs import Minimum, minimise
from puzzle_core.search.milp import keep_useful
from puzzle_core.search.problem import Limit, Problem


@pytest.mark.parametrize("seed", range(20))
def test_leaving_options_out_changes_nothing(
    seed: int, random_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(seed, limits=2, layers=5)
    problem = problem.avoiding(problem.parent, 2, "shared")
    pruned = minimise(problem, problem.score)
    monkeypatch.setattr(milp, "undominated", lambda *arguments: np.ones(arguments[-1].size, dtype=bool))
    whole = minimise(problem, problem.score)
    assert (pruned is None) == (whole is None)
    if pruned is not None and whole is not None:
        assert pruned.cost == pytest.approx(whole.cost, rel=1e-6, abs=1e-12)


def test_dominated_and_oversized_options_go(pair: Problem) -> None:
    assert [rows.tolist() for rows in keep_useful(pair, pair.score) or []] == [[0], [0]], "no limit: the best alone"
    memory = pair.with_limits([Limit("memory", "bytes", 30.0, "GB")])
    assert [rows.tolist() for rows in keep_useful(memory, pair.score) or []] == [[0, 1, 2], [0, 1, 2]]
    latency = pair.with_limits([Limit("latency", "ms", 30.0, "ms")])
    assert [rows.tolist() for rows in keep_useful(latency, pair.score) or []] == [[0, 1], [0, 1]], "none is worse twice"
    tight = pair.with_limits([Limit("memory", "bytes", 9.0, "GB")])
    assert [rows.tolist() for rows in keep_useful(tight, pair.score) or []] == [[1, 2], [1, 2]], "10 + 1 is above 9"


def test_a_dominated_option_stays_when_its_better_is_to_be_avoided(pair: Problem) -> None:
    """`half` is no better than `full` in anything, and the only good one left where `full` is to be avoided."""
    problem = pair.avoiding((0, 0), 0, "shared")
    assert [rows.tolist() for rows in keep_useful(problem, pair.score) or []] == [[1], [1]]
    found = minimise(problem, pair.score)
    assert found is not None
    assert found.choice == (1, 1)


def test_of_equal_options_the_parents_own_stays(pair: Problem) -> None:
    equal = (np.zeros(3), np.zeros(3))
    problem = replace(pair, score=equal, resources={}, parent=(2, 1))
    assert [rows.tolist() for rows in keep_useful(problem, equal) or []] == [[2], [1]]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (Minimum((0, 0), 0.0, 0.0, True), r"outside the limits or rules \['memory'\]"),
        (Minimum((2, 2), 0.0, 0.0, True), "its choice costs 8.0"),
    ],
)
def test_a_wrong_answer_of_the_solver_is_noticed(
    pair: Problem, monkeypatch: pytest.MonkeyPatch, returned: Minimum, text: str
) -> None:
    monkeypatch.setattr(highs, "_solve_core", lambda *arguments: returned)
    with pytest.raises(RuntimeError, match=text):
        minimise(pair.with_limits([Limit("memory", "bytes", 15.0, "GB")]), pair.score)


@pytest.mark.parametrize("start", [(0, 0), (2, 2), (1, 1)])
def test_the_answer_does_not_depend_on_the_start(pair: Problem, start: tuple[int, int]) -> None:
    problem = pair.with_limits([Limit("memory", "bytes", 16.0, "GB"), Limit("latency", "ms", 20.0, "ms")])
    found = minimise(problem, pair.score, start=start)
    assert found is not None
    assert found.choice == (1, 0)
