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
from puzzle_core.search.problem import TOLERANCE, Choice, Column, Limit, Problem, Solution
from puzzle_core.search.relaxation import Relaxation, Relaxed

RELATIVE_STEP = 0.01
"""The default step by which a capacity is relaxed, relative to the capacity."""

EXACT_WORK = 150_000
"""Work of all exact solves together: enough for every layer of a small model, and for none of 80 layers of 54 options,
where each would take as long as the answer."""
EXACT_NODES = 200
"""Nodes of one exact solve."""
DIGITS = 1e-3
"""An interval this narrow, relative to its upper end, is not worth a solve."""

CHANGES = 128
"""Options, those of least excess, that are tried as changes of a choice, alone and in pairs."""
ROUNDS, TRIES, ROUNDINGS = 10, 4, 16


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
    """One variation: lower and upper bound on its score, the choice of the upper bound, and options in question.

    `layer` is that whose chosen option is forbidden; the problem allows it still.
    """

    problem: Problem
    low: float
    high: float
    choice: Choice | None = None
    layer: int | None = None
    options: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        return 0.0 if self.low == self.high else self.high - self.low

    def improve(self, choice: Choice | None) -> bool:
        """Take a choice that scores below the upper bound, and say whether it does."""
        score = math.inf if choice is None else self.problem.total_score(choice)
        if score >= self.high:
            return False
        self.high, self.choice = score, choice
        return True


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
        wide = variation.width == math.inf or variation.width > DIGITS * change
        if wide and change > noise and left >= around.relaxation.work:
            left -= _close(variation, solution.choice, relative_gap, around.relaxation.work)
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


def _close(variation: _Variation, answer: Choice, relative_gap: float, least_work: int) -> int:
    """Solve a variation exactly, as far as EXACT_NODES go, and return the work."""
    problem, layer, effort = variation.problem, variation.layer, Effort(nodes=EXACT_NODES)
    if layer is not None:
        avoided = tuple(index if number == layer else -1 for number, index in enumerate(answer))
        problem = problem.avoiding(avoided, 0, f"layer {layer} takes another option")
    try:
        minimum = minimise(problem, problem.score, effort=effort, relative_gap=relative_gap, start=variation.choice)
    except SolveLimitError:
        return least_work
    if minimum is None:
        variation.low = variation.high = math.inf
        variation.options = ()
        return least_work
    if minimum.cost <= variation.high:
        variation.high, variation.choice = minimum.cost, minimum.choice
    variation.low = variation.high if minimum.proven else max(variation.low, minimum.bound)
    if minimum.proven and layer is not None:
        variation.options = (problem.options[layer][minimum.choice[layer]],)
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
        columns = [problem.resources[limit.resource] for limit in problem.limits]
        self.values_CLJ = np.stack([_padded(column) for column in (problem.score, *columns)])
        self.alone_M = np.bincount(self.model.column, minlength=self.model.cost.size)[self.model.column] == 1
        self.room_K = [headroom(limit, column) for limit, column in zip(self.loosest.limits, columns, strict=True)]
        self.bounds = self._bounds(problem)

    def loosened(self, limit: Limit, step: float) -> _Variation:
        """The problem with one limit looser."""
        problem = self.problem.with_capacity(limit.name, limit.capacity + step)
        variation = _Variation(problem, self.least, self.solution.objective, self.solution.choice)
        upper_K, too_large_N = self._bounds(problem)
        relaxed = self.relaxation.solve(too_large_N, upper_K)
        if relaxed is not None:
            self._narrow(variation, relaxed)
        return variation

    def without(self, layer: int) -> _Variation:
        """The problem without the chosen option of one layer."""
        model, problem = self.model, self.problem
        here_M, chosen_M = model.layer == layer, model.option == self.solution.choice[layer]
        upper_K, forbidden_N = self.bounds
        forbidden_N = forbidden_N.copy()
        forbidden_N[model.column[here_M & chosen_M]] = True
        relaxed = self.relaxation.solve(forbidden_N, upper_K)
        if relaxed is None:
            return _Variation(problem, math.inf, math.inf, layer=layer)
        variation = _Variation(problem, self.least, math.inf, layer=layer)
        excess_M = relaxed.excess[model.column]
        self._narrow(variation, relaxed)
        reached = self._cost(relaxed.bound + excess_M)
        options = {int(model.option[place]): float(reached[place]) for place in np.flatnonzero(here_M & ~chosen_M)}
        best = -1 if variation.choice is None else variation.choice[layer]
        possible = sorted(option for option, low in options.items() if low <= variation.high and low < math.inf)
        ids = problem.options[layer]
        variation.options = tuple(ids[o] for o in sorted(possible, key=lambda o: (o != best, options[o])))
        return variation

    def _bounds(self, problem: Problem) -> tuple[Floats, Mask]:
        """The capacities of a problem in the units of the model, (K,), and the columns that alone exceed one, (N,)."""
        ratios = [
            headroom(limit, problem.resources[limit.resource]) / (room or 1.0)
            for limit, room in zip(problem.limits, self.room_K, strict=True)
        ]
        upper_K = SCALE * np.array(ratios, dtype=np.float64)
        return upper_K, np.asarray((self.model.use > upper_K[:, None] * (1.0 + TOLERANCE)).any(axis=0))

    def _cost(self, scaled: Floats) -> Floats:
        return np.asarray(self.least + scaled * self.unit)

    def _narrow(self, variation: _Variation, relaxed: Relaxed) -> None:
        """Raise the lower bound to that of the relaxation, and lower the upper one by rounding and by changes."""
        model, problem = self.model, variation.problem
        variation.low = max(variation.low, float(self._cost(np.array(relaxed.bound))))
        excess_M = relaxed.excess[model.column]
        here_M = model.layer == variation.layer
        starts = [self._rounded(problem, relaxed)]
        if variation.choice is None:
            beside = self._changed(problem, self.solution.choice, _least(here_M, excess_M), _least(~here_M, excess_M))
            starts.append(beside)
        for start in starts:
            variation.improve(start)
        for _ in range(ROUNDS):
            if variation.choice is None:
                break
            near = _least(excess_M * self.unit <= variation.width, excess_M)
            if not variation.improve(self._changed(problem, variation.choice, near, near)):
                break
        variation.high = max(variation.high, variation.low)

    def _sums(self, choices_BL: Indices) -> Floats:
        """Score and use of every limit, (1 + K, B), summed fast: `problem.feasible` has the last word."""
        return np.asarray(self.values_CLJ[:, np.arange(self.model.layers), choices_BL].sum(axis=2))

    def _rounded(self, problem: Problem, relaxed: Relaxed) -> Choice | None:
        """The best choice among the options that the relaxation takes, if these make few choices and one fits."""
        model = self.model
        taken = np.flatnonzero(relaxed.share[model.column] > 1e-6)
        layers = model.layer[taken]
        open_layers = np.flatnonzero(np.bincount(layers, minlength=model.layers) > 1)
        options = [model.option[taken[layers == layer]] for layer in open_layers]
        count = math.prod(map(len, options))
        if count > ROUNDINGS:
            return None
        choices_BL = np.zeros((count, model.layers), dtype=np.int64)
        choices_BL[:, layers] = model.option[taken]
        if options:
            choices_BL[:, open_layers] = list(itertools.product(*options))
        score_B, *use_KB = self._sums(choices_BL)
        fits_B = np.ones(count, dtype=bool)
        for limit, use_B in zip(problem.limits, use_KB, strict=True):
            fits_B &= use_B <= limit.capacity + TOLERANCE * abs(limit.capacity)
        for place in np.flatnonzero(fits_B)[np.argsort(score_B[fits_B], kind="stable")]:
            choice = tuple(choices_BL[place].tolist())
            if problem.feasible(choice):
                return choice
        return None

    def _changed(self, problem: Problem, choice: Choice, first: Indices, second: Indices) -> Choice | None:
        """The best choice with one option of `first` and at most one of `second` instead of its own, if one fits."""
        model, own = self.model, np.asarray(choice)
        tied = np.zeros(model.layers, dtype=bool)
        tied[model.layer[~self.alone_M & (own[model.layer] == model.option)]] = True
        own_CL = self.values_CLJ[:, np.arange(model.layers), own]

        def moves(places: Indices) -> tuple[Indices, Floats]:
            """The places that change something, and by how much each changes every sum, (1 + K, ...)."""
            layers = model.layer[places]
            places = places[self.alone_M[places] & ~tied[layers] & (own[layers] != model.option[places])]
            layers = model.layer[places]
            return places, self.values_CLJ[:, layers, model.option[places]] - own_CL[:, layers]

        (first, rise_CA), (second, rise_CB) = moves(first), moves(second)
        rise_CB = np.concatenate([np.zeros((rise_CB.shape[0], 1)), rise_CB], axis=1)
        total_AB = rise_CA[0][:, None] + rise_CB[0]
        wrong_AB = model.layer[first][:, None] == np.concatenate([[-1], model.layer[second]])
        for limit, used, rise_A, rise_B in zip(
            problem.limits, own_CL[1:].sum(axis=1), rise_CA[1:], rise_CB[1:], strict=True
        ):
            room = limit.capacity - used + 0.5 * TOLERANCE * abs(limit.capacity)
            wrong_AB |= rise_A[:, None] > room - rise_B
        total_AB[wrong_AB] = np.inf
        total = total_AB.ravel()
        count = min(TRIES, total.size)
        nearest = np.argpartition(total, count - 1)[:count] if count else np.zeros(0, dtype=np.int64)
        for place in nearest[np.lexsort((nearest, total[nearest]))]:
            if total[place] == np.inf:
                return None
            row, column = divmod(int(place), second.size + 1)
            changed = list(choice)
            for entry in (first[row], *(second[column - 1 : column] if column else ())):
                changed[model.layer[entry]] = int(model.option[entry])
            if problem.feasible(changed):
                return tuple(changed)
        return None


def _padded(column: Column) -> Floats:
    """A column as one array (L, J), with zeros for options that a layer does not have."""
    padded = np.zeros((len(column), max(values.size for values in column)))
    for row, values in zip(padded, column, strict=True):
        row[: values.size] = values
    return padded


def _least(mask_M: Mask, excess_M: Floats) -> Indices:
    """The places of a mask, at most CHANGES of them, those of least excess."""
    places = np.flatnonzero(mask_M & (excess_M < np.inf))
    return np.sort(places[np.argsort(excess_M[places], kind="stable")[:CHANGES]])
