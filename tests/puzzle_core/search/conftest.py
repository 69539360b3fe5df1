"""Random small problems, and the slow, obvious search that the fast ones are compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from puzzle_core.search.problem import Choice, Limit, Problem
from puzzle_core.search.rules import UNCOUNTED, AllOrNone, AtMostDistinct, Rule

Avoid = Sequence[tuple[Choice, int]]


def make_problem(seed: int, limits: int | None = None, layers: int | None = None, options: int = 6) -> Problem:
    """Up to 5 layers of up to 6 options; every other problem has small whole numbers, so ties and exact fits abound.

    Capacities lie between a little under the least use and three quarters of the way to the largest.
    """
    random = np.random.default_rng(seed)
    layers = layers or int(random.integers(1, 6))
    sizes = random.integers(1, options + 1, layers)

    def column() -> tuple[np.ndarray, ...]:
        if seed % 2:
            return tuple(random.integers(0, 7, size).astype(float) for size in sizes)
        return tuple(random.random(size) for size in sizes)

    resources = {name: column() for name in ("bytes", "prefill_ms", "decode_ms")}
    count = limits if limits is not None else int(random.integers(1, 4))
    bounds = []
    for name, values in list(resources.items())[:count]:
        least, most = sum(x.min() for x in values), sum(x.max() for x in values)
        capacity = least + (most - least) * random.uniform(-0.05, 0.75)
        bounds.append(Limit(f"{name} limit", name, float(np.floor(capacity) if seed % 2 else capacity), name))
    return Problem(
        options=tuple(tuple(f"v{index}" for index in range(size)) for size in sizes),
        score=column(),
        parent=tuple(int(random.integers(size)) for size in sizes),
        resources=resources,
        limits=tuple(bounds),
    )


def with_rules(problem: Problem, seed: int) -> Problem:
    """The problem with up to two AtMostDistinct rules and up to two AllOrNone rules, if it has layers and options
    enough.
    """
    random = np.random.default_rng(10_000 + seed)
    rules: list[Rule] = []
    for number in range(int(random.integers(0, 3))):
        groups = tuple(random.integers(UNCOUNTED, 4, len(ids)) for ids in problem.options)
        rules.append(AtMostDistinct(f"distinct {number}", groups, int(random.integers(1, 4))))
    free = [[j for j in range(len(ids)) if j != own] for ids, own in zip(problem.options, problem.parent, strict=True)]
    for number in range(int(random.integers(0, 3))):
        layers = [layer for layer in range(len(free)) if free[layer]]
        if len(layers) < 2:
            break
        span = sorted(random.permutation(layers)[: int(random.integers(2, 4))].tolist())
        members = tuple((layer, free[layer].pop(int(random.integers(len(free[layer]))))) for layer in span)
        rules.append(AllOrNone(f"together {number}", members))
    return replace(problem, rules=tuple(rules))


def with_free_continuations(problem: Problem) -> Problem:
    """As variants over several layers are priced: the first member carries score and costs, the others nothing."""
    score = [values.copy() for values in problem.score]
    resources = {name: [values.copy() for values in column] for name, column in problem.resources.items()}
    for rule in problem.rules:
        for layer, option in rule.members[1:] if isinstance(rule, AllOrNone) else ():
            for column in (score, *resources.values()):
                column[layer][option] = 0.0
    return replace(problem, score=tuple(score), resources={name: tuple(column) for name, column in resources.items()})


def in_other_units(problem: Problem) -> Iterator[Problem]:
    """The problem with its scores, and with its costs and limits, from a millionth to a million times as large."""
    for factor in (1e-6, 1e-3, 1e3, 1e6):
        yield replace(problem, score=tuple(values * factor for values in problem.score))
        columns = {name: tuple(x * factor for x in column) for name, column in problem.resources.items()}
        limits = tuple(replace(limit, capacity=limit.capacity * factor) for limit in problem.limits)
        yield replace(problem, resources=columns, limits=limits)


def all_choices(problem: Problem) -> list[Choice]:
    """Every architecture there is."""
    return list(product(*(range(len(ids)) for ids in problem.options)))


def best_by_brute_force(problem: Problem, avoid: Avoid = ()) -> float | None:
    """The least total score of all choices that fit, by trying each; None when none fits."""

    columns = (problem.score, *(problem.resources[limit.resource] for limit in problem.limits))

    def differs(choice: Choice) -> bool:
        return all(sum(a == b for a, b in zip(choice, other, strict=True)) <= shared for other, shared in avoid)

    best = None
    for choice in all_choices(problem):
        score, *used = (sum(float(values[j]) for values, j in zip(column, choice, strict=True)) for column in columns)
        fits = all(
            use <= limit.capacity + 1e-9 * abs(limit.capacity) for use, limit in zip(used, problem.limits, strict=True)
        )
        if fits and obeys(problem.rules, choice) and differs(choice) and (best is None or score < best):
            best = score
    return best


def obeys(rules: Sequence[Rule], choice: Choice) -> bool:
    """Whether a choice obeys the rules, spelt out."""
    for rule in rules:
        if isinstance(rule, AllOrNone):
            chosen = [choice[layer] == option for layer, option in rule.members]
            if any(chosen) and not all(chosen):
                return False
        else:
            groups = [int(groups[option]) for groups, option in zip(rule.groups, choice, strict=True)]
            if len(set(groups) - {-1}) > rule.at_most:
                return False
    return True


@pytest.fixture
def random_problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture
def ruled_problem() -> Callable[..., Problem]:
    """Random problems with rules; of every third, variants that span layers cost only in their first."""

    def make(seed: int, **sizes: int) -> Problem:
        problem = with_rules(make_problem(seed, **sizes), seed)
        return with_free_continuations(problem) if seed % 3 == 0 else problem

    return make


@pytest.fixture
def brute_force() -> Callable[..., float | None]:
    return best_by_brute_force


@pytest.fixture
def every_choice() -> Callable[[Problem], list[Choice]]:
    return all_choices


@pytest.fixture
def pair() -> Problem:
    """Two layers, three options, numbers to follow by hand. The parent is (0, 0): score 0, 20 GB, 8 ms."""
    return Problem(
        options=(("full", "half", "none"), ("full", "half", "none")),
        score=(np.array([0.0, 1.0, 5.0]), np.array([0.0, 2.0, 3.0])),
        parent=(0, 0),
        resources={
            "bytes": (np.array([10.0, 6.0, 1.0]), np.array([10.0, 6.0, 2.0])),
            "ms": (np.array([4.0, 3.0, 9.0]), np.array([4.0, 3.0, 9.0])),
        },
    )
