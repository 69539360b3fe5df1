"""An infeasible search names the fewest limits that cannot hold together, and what each could be."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from puzzle_core.errors import InfeasibleError
from puzzle_core.search import infeasible
from puzzle_core.search.effort import Effort
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem
from puzzle_core.search.rules import AllOrNone, AtMostDistinct

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


def smallest_sets(problem: Problem, brute_force: Callable) -> list[tuple[str, ...]]:
    """The smallest sets of limits and AtMostDistinct rules that cannot hold together, by trying all sets in order of
    size.
    """
    parts = [*problem.limits, *(rule for rule in problem.rules if isinstance(rule, AtMostDistinct))]
    tied = tuple(rule for rule in problem.rules if isinstance(rule, AllOrNone))
    for size in range(1, len(parts) + 1):
        found = []
        for group in combinations(parts, size):
            rules = tuple(part for part in group if isinstance(part, AtMostDistinct))
            limits = tuple(part for part in group if isinstance(part, Limit))
            if brute_force(replace(problem, limits=limits, rules=(*tied, *rules))) is None:
                found.append(tuple(part.name for part in group))
        if found:
            return found
    raise AssertionError("the problem is feasible")


def test_with_rules_and_cuts_too_the_fewest_are_named(ruled_problem: Callable, brute_force: Callable) -> None:
    sizes, kinds = [], set()
    for seed in range(900, 1000):
        problem = ruled_problem(seed, limits=2, layers=4, options=4)
        if seed % 2:
            problem = problem.avoiding(problem.parent, 1, "shared")
        problem = problem.with_limits(replace(limit, capacity=limit.capacity * 0.8) for limit in problem.limits)
        if brute_force(problem) is not None:
            continue
        with pytest.raises(InfeasibleError) as caught:
            solve(problem)
        conflicts = caught.value.conflicts
        assert tuple(conflict.limit.name for conflict in conflicts) in smallest_sets(problem, brute_force)
        sizes.append(len(conflicts))
        for conflict in conflicts:
            kinds.add(type(conflict.limit))
            if conflict.least is not None:
                assert brute_force(loosened(problem, conflict.limit, conflict.least)) is not None
    assert sizes.count(1) >= 5
    assert len(sizes) - sizes.count(1) >= 5
    assert kinds == {Limit, AtMostDistinct}


def loosened(problem: Problem, part: Limit | AtMostDistinct, least: float) -> Problem:
    """The problem with one part asking for no more than the least."""
    if isinstance(part, Limit):
        return problem.with_capacity(part.name, least)
    rules = (replace(rule, at_most=int(least)) if rule is part else rule for rule in problem.rules)
    return replace(problem, rules=tuple(rules))


def test_many_limits_are_explained_in_few_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 limits, of which the three at odds are two by two compatible: trying all sets would take 2,000 solves."""
    random = np.random.default_rng(3)
    columns = {f"r{number}": tuple(random.random(4) for _ in range(6)) for number in range(24)}
    limits = [Limit(name, name, 6.0, "GB") for name in columns]
    onehot = {
        f"only {k}": tuple(np.array([*(float(j == k) for j in range(3)), 0.5]) for _ in range(6)) for k in range(3)
    }
    limits += [Limit(name, name, 1.4, "layers") for name in onehot]
    problem = Problem(
        (("a", "b", "c", "d"),) * 6, (random.random(4),) * 6, (0,) * 6, {**columns, **onehot}, tuple(limits)
    )
    solves = []
    minimise = infeasible.minimise
    monkeypatch.setattr(infeasible, "minimise", lambda *args, **named: solves.append(1) or minimise(*args, **named))
    with pytest.raises(InfeasibleError) as caught:
        solve(problem)
    assert [conflict.limit.name for conflict in caught.value.conflicts] == ["only 0", "only 1", "only 2"]
    assert len(solves) <= 60


def test_twenty_earlier_choices_are_explained_quickly() -> None:
    """All 16 architectures of two layers and four options are to be avoided: each is needed, and none can go."""
    ids = ("a", "b", "c", "d")
    problem = Problem((ids, ids), (np.arange(4.0), np.arange(4.0)), (0, 0), {})
    avoid = [((i, j), 1) for i in range(4) for j in range(4)]
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, avoid=[*avoid, *((choice, 2) for choice, _ in avoid[:4])])
    assert len(caught.value.conflicts) == 16


def test_when_the_time_ends_the_named_parts_still_cannot_hold_together(pair: Problem) -> None:
    limits = [replace(MEMORY, capacity=6.0), LATENCY, Limit("loose", "bytes", 99.0, "GB")]
    error = infeasible.explain_infeasible(pair.with_limits(limits), effort=Effort(seconds=0.0))
    assert {"memory", "latency"} <= {conflict.limit.name for conflict in error.conflicts}


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
