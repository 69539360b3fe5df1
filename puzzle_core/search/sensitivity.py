"""What the limits and the choices of an answer cost: intervals for all, exact values as far as a budget of work goes.

A variation is the problem with one limit looser (a price), or without the chosen option of one layer (a runner-up). One
relaxation of the answer's problem, solved again from its basis, bounds every variation from below (relaxation.py); a
rounding of it and changes of the answer, two layers at a time, bound it from above. Options that would exceed the upper
bound cannot matter, and no change takes them. The widest intervals are then closed by exact solves, while the work
lasts. Work is counted in columns, rows and iterations, never in seconds, so every machine gives the same intervals.

Legend: L layers, K limits, N columns of the model, M options taken by columns.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from puzzle_core.errors import SolveLimitError, SpecError
from puzzle_core.search.effort import Effort
from puzzle_core.search.highs import above_least, minimise
from puzzle_core.search.milp import SCALE, Floats, Indices, Mask, build, headroom, keep_useful
from puzzle_core.search.problem import TOLERANCE, Choice, Limit, Problem, Solution
from puzzle_core.search.relaxation import Relaxation, Relaxed

RELATIVE_STEP = 0.01
"""The default step by which a capacity is relaxed, relative to the capacity."""

EXACT_WORK = 500_000
"""Work of all exact solves together: enough for every layer of a small model, and for none of 80 layers of 54 options,
where each would take as long as the answer."""
EXACT_NODES = 200
"""Nodes of one exact solve."""
DIGITS = 1e-3
"""An interval this narrow, relative to its upper end, is not worth a solve."""

CHANGES = 300
"""Options, those of least excess, that are tried as changes of a choice, alone and in pairs."""
ROUNDS, TRIES, ROUNDINGS = 10, 10, 64


@dataclass(frozen=True)
class Price:
    """The gain in score when one limit is relaxed.

    Attributes:
        step: increase of the capacity, in the limit's unit.
        at_least, at_most: decrease of the best score with this step; equal where it is known exactly, 0 if the limit
            does not bind.
    """

    limit: Limit
    step: float
    at_least: float
    at_most: float


@dataclass(frozen=True)
class WithoutChoice:
    """What a layer takes when its chosen option is forbidden and all other layers may change.

    Attributes:
        options: options that may be it, the likeliest first; one where it is certain, none if no choice fits.
        at_least, at_most: increase of the best score; equal where it is known exactly. `at_most` is infinite where no
            choice was found and none was ruled out.
    """

    options: tuple[str, ...]
    at_least: float
    at_most: float


@dataclass
class _Variation:
    """One variation: lower and upper bound on its score, the choice of the upper bound, and options in question."""

    problem: Problem
    low: float
    high: float
    choice: Choice | None = None
    layer: int | None = None
    options: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        return self.high - self.low


def explain(
    problem: Problem, solution: Solution, *, steps: Mapping[str, float] | None = None, relative_gap: float = 1e-6
) -> tuple[list[Price], list[WithoutChoice]]:
    """The price of every limit, in their order, and what every layer takes without its choice.

    Differences below `relative_gap` of the cost of all limits count as 0.

    Args:
        solution: the best of the problem.
        steps: by limit name, in its unit; RELATIVE_STEP of the capacity for other limits.

    Raises:
        SpecError: a step names no limit, or is not above 0.
    """
    sizes = _checked_steps(problem, steps or {})
    around = _Around(problem, solution, sizes)
    noise = relative_gap * (solution.objective - math.fsum(float(values.min()) for values in problem.score))
    prices = [around.loosened(limit, sizes[limit.name]) for limit in problem.limits]
    layers = [around.without(layer) for layer in range(len(problem.options))]
    left = EXACT_WORK
    for variation in [*prices, *sorted(layers, key=lambda layer: -layer.width)]:
        change = max(variation.high - solution.objective, solution.objective - variation.low)
        if left >= around.relaxation.work and change > noise and not variation.width <= DIGITS * change:
            left -= _close(variation, problem, relative_gap, around.relaxation.work)
    found = []
    for limit, price in zip(problem.limits, prices, strict=True):
        ends = (solution.objective - price.high, solution.objective - price.low)
        low, high = (max(0.0, end) if end > noise else 0.0 for end in ends)
        found.append(Price(limit, sizes[limit.name], low, high))
    others = [
        WithoutChoice(layer.options, *(max(0.0, end - solution.objective) for end in (layer.low, layer.high)))
        for layer in layers
    ]
    return found, others


def _checked_steps(problem: Problem, steps: Mapping[str, float]) -> dict[str, float]:
    names = [limit.name for limit in problem.limits]
    sizes = {limit.name: RELATIVE_STEP * abs(limit.capacity) or RELATIVE_STEP for limit in problem.limits} | dict(steps)
    wrong = [name for name, step in sizes.items() if step <= 0.0 or name not in names]
    if wrong:
        raise SpecError(
            f"a price needs a step above 0 for a known limit, got {sizes[wrong[0]]} for {wrong[0]!r} "
            f"(limits: {', '.join(names) or 'none'})"
        )
    return sizes


def _close(variation: _Variation, problem: Problem, relative_gap: float, least_work: int) -> int:
    """Solve a variation exactly, as far as EXACT_NODES go, and return the work."""
    effort = Effort(nodes=EXACT_NODES)
    try:
        minimum = minimise(
            variation.problem, problem.score, effort=effort, relative_gap=relative_gap, start=variation.choice
        )
    except SolveLimitError:
        return least_work
    if minimum is None:
        variation.low = variation.high = math.inf
        variation.options = ()
        return least_work
    if minimum.cost <= variation.high:
        variation.high, variation.choice = minimum.cost, minimum.choice
    variation.low = variation.high if minimum.proven else max(variation.low, minimum.bound)
    if minimum.proven and variation.layer is not None:
        variation.options = (problem.options[variation.layer][minimum.choice[variation.layer]],)
    return minimum.work


class _Around:
    """The options that any variation can need, their relaxation, and changes of the answer."""

    def __init__(self, problem: Problem, solution: Solution, steps: Mapping[str, float]) -> None:
        self.problem, self.solution = problem, solution
        self.loosest = problem.with_limits(
            replace(limit, capacity=limit.capacity + steps[limit.name]) for limit in problem.limits
        )
        self.least, extra = above_least(problem.score)
        kept = keep_useful(self.loosest, problem.score, beside=solution.choice)
        assert kept is not None, "the answer fits"
        self.model, self.unit = build(self.loosest, extra, kept)
        self.relaxation = Relaxation(self.model)
        model = self.model
        self.score_M = _flat(problem.score, model.layer, model.option)
        columns = [problem.resources[limit.resource] for limit in problem.limits]
        uses = [_flat(column, model.layer, model.option) for column in columns]
        self.use_KM = np.reshape(uses, (len(uses), model.layer.size))
        self.alone_M = np.bincount(model.column, minlength=model.cost.size)[model.column] == 1

    def loosened(self, limit: Limit, step: float) -> _Variation:
        """The problem with one limit looser."""
        problem = self.problem.with_capacity(limit.name, limit.capacity + step)
        variation = _Variation(problem, self.least, self.solution.objective, self.solution.choice)
        relaxed = self._relaxed(problem, np.zeros(self.model.cost.size, dtype=bool))
        if relaxed is not None:
            self._narrow(variation, relaxed)
        return variation

    def without(self, layer: int) -> _Variation:
        """The problem without the chosen option of one layer."""
        model, index = self.model, self.solution.choice[layer]
        here_M, chosen_M = model.layer == layer, model.option == index
        forbidden = np.zeros(model.cost.size, dtype=bool)
        forbidden[model.column[here_M & chosen_M]] = True
        avoided = tuple(index if number == layer else -1 for number in range(model.layers))
        problem = self.problem.avoiding(avoided, 0, f"layer {layer} takes another option")
        relaxed = self._relaxed(self.problem, forbidden)
        if relaxed is None:
            return _Variation(problem, math.inf, math.inf, layer=layer)
        variation = _Variation(problem, self.least, math.inf, layer=layer)
        excess_M = relaxed.excess[model.column]
        near = self._changed(
            problem, self.solution.choice, _least(here_M & ~chosen_M, excess_M), _least(~here_M, excess_M)
        )
        if near is not None:
            variation.high, variation.choice = problem.total_score(near), near
        self._narrow(variation, relaxed)
        reached = self._cost(relaxed.bound + excess_M)
        options = {int(model.option[place]): float(reached[place]) for place in np.flatnonzero(here_M & ~chosen_M)}
        best = -1 if variation.choice is None else variation.choice[layer]
        possible = sorted(option for option, low in options.items() if low <= variation.high and low < math.inf)
        ids = self.problem.options[layer]
        variation.options = tuple(ids[o] for o in sorted(possible, key=lambda o: (o != best, options[o])))
        return variation

    def _relaxed(self, problem: Problem, forbidden_N: Mask) -> Relaxed | None:
        """The relaxation at the capacities of a problem, without columns that alone exceed one."""
        upper_K = np.array([
            SCALE * headroom(limit, problem.resources[limit.resource])
            / (headroom(loosest, problem.resources[limit.resource]) or 1.0)
            for limit, loosest in zip(problem.limits, self.loosest.limits, strict=True)
        ])  # fmt: skip
        too_large = (self.model.use > upper_K[:, None] * (1.0 + TOLERANCE)).any(axis=0)
        return self.relaxation.solve(forbidden_N | too_large, upper_K)

    def _cost(self, scaled: Floats) -> Floats:
        return np.asarray(self.least + scaled * self.unit)

    def _narrow(self, variation: _Variation, relaxed: Relaxed) -> None:
        """Raise the lower bound to that of the relaxation, and lower the upper one by rounding and by changes."""
        model, problem = self.model, variation.problem
        variation.low = max(variation.low, float(self._cost(np.array(relaxed.bound))))
        rounded = self._rounded(problem, relaxed)
        if rounded is not None and problem.total_score(rounded) < variation.high:
            variation.high, variation.choice = problem.total_score(rounded), rounded
        for _ in range(ROUNDS):
            if variation.choice is None:
                break
            excess_M = relaxed.excess[model.column]
            near = _least(excess_M * self.unit <= variation.width, excess_M)
            better = self._changed(problem, variation.choice, near, near)
            if better is None or problem.total_score(better) >= variation.high:
                break
            variation.high, variation.choice = problem.total_score(better), better
        variation.high = max(variation.high, variation.low)

    def _rounded(self, problem: Problem, relaxed: Relaxed) -> Choice | None:
        """The best choice among the options that the relaxation takes, if these make few choices and one fits."""
        model = self.model
        taken = np.flatnonzero(relaxed.share[model.column] > 1e-6)
        options: list[list[int]] = [[] for _ in range(model.layers)]
        for place in taken:
            options[model.layer[place]].append(int(model.option[place]))
        if math.prod(map(len, options)) > ROUNDINGS:
            return None
        fitting = [choice for choice in itertools.product(*options) if problem.feasible(choice)]
        return min(fitting, key=problem.total_score, default=None)

    def _changed(self, problem: Problem, choice: Choice, first: Indices, second: Indices) -> Choice | None:
        """The best choice that takes an option of `first` and at most one of `second` instead of its own, if one fits."""
        model, own = self.model, np.asarray(choice)
        tied = np.zeros(model.layers, dtype=bool)
        tied[model.layer[~self.alone_M & (own[model.layer] == model.option)]] = True

        def movable(places: Indices) -> Indices:
            layers = model.layer[places]
            return places[self.alone_M[places] & ~tied[layers] & (own[layers] != model.option[places])]

        first, second = movable(first), movable(second)
        layer_1, layer_2 = model.layer[first], np.concatenate([[-1], model.layer[second]])
        score = _rises(self.score_M, problem.score, model.layer, choice)
        total = score[first][:, None] + np.concatenate([[0.0], score[second]])
        total[layer_1[:, None] == layer_2] = np.inf
        for limit, use_M in zip(self.problem.limits, self.use_KM, strict=True):
            capacity = next(other.capacity for other in problem.limits if other.name == limit.name)
            rise = _rises(use_M, problem.resources[limit.resource], model.layer, choice)
            room = capacity - problem.total(limit.resource, choice) + 0.5 * TOLERANCE * abs(capacity)
            total[rise[first][:, None] + np.concatenate([[0.0], rise[second]]) > room] = np.inf
        flat = total.ravel()
        count = min(TRIES, flat.size)
        if not count:
            return None
        nearest = np.argpartition(flat, count - 1)[:count]
        for place in nearest[np.lexsort((nearest, flat[nearest]))]:
            if flat[place] == np.inf:
                return None
            row, column = divmod(int(place), layer_2.size)
            changed = list(choice)
            for entry in (first[row], *(second[column - 1 : column] if column else ())):
                changed[model.layer[entry]] = int(model.option[entry])
            if problem.feasible(changed):
                return tuple(changed)
        return None


def _flat(column: tuple[Floats, ...], layer: Indices, option: Indices) -> Floats:
    return np.array([column[i][j] for i, j in zip(layer, option, strict=True)], dtype=np.float64)


def _rises(values_M: Floats, column: tuple[Floats, ...], layer_M: Indices, choice: Choice) -> Floats:
    """The increase of a sum when a choice takes each option instead of its own, (M,)."""
    own = np.array([values[index] for values, index in zip(column, choice, strict=True)])
    return np.asarray(values_M - own[layer_M])


def _least(mask_M: Mask, excess_M: Floats) -> Indices:
    """The places of a mask, at most CHANGES of them, those of least excess."""
    places = np.flatnonzero(mask_M & (excess_M < np.inf))
    return np.sort(places[np.argsort(excess_M[places], kind="stable")[:CHANGES]])
