"""Random small problems, and the slow, obvious search that the fast ones are compared with."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from puzzle_core.search.problem import Choice, Limit, Problem

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


def all_choices(problem: Problem) -> list[Choice]:
    """Every architecture there is."""
    return list(product(*(range(len(ids)) for ids in problem.options)))


def best_by_brute_force(problem: Problem, avoid: Avoid = ()) -> float | None:
    """The least total score of all choices that fit, by trying each; None when none fits."""

    def differs(choice: Choice) -> bool:
        return all(sum(a == b for a, b in zip(choice, other, strict=True)) <= shared for other, shared in avoid)

    scores = [
        problem.total_score(choice) for choice in all_choices(problem) if problem.feasible(choice) and differs(choice)
    ]
    return min(scores, default=None)


@pytest.fixture
def random_problem() -> Callable[..., Problem]:
    return make_problem


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
