"""The search problem as arrays: options per layer, scores, resources, limits on sums, rules (METHOD section 6).

Options are opaque here. The caller subtracts fixed costs outside the layers from every capacity.

Legend: L layers, J options of a layer (not the same for all). A column is a tuple of L arrays of shape (J,); a choice
is a tuple of L option indices.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from puzzle_core.errors import CoverageError, NonFiniteError, SpecError
from puzzle_core.search.rules import AllOrNone, Rule, check_rules, drop_broken

Choice = tuple[int, ...]
Column = tuple[NDArray[np.float64], ...]

TOLERANCE = 1e-9
"""Tolerance of the use of a limit above its capacity, relative to the capacity, for rounding errors."""


@dataclass(frozen=True)
class Limit:
    """The sum over layers of one resource may not exceed `capacity`, in `unit`."""

    name: str
    resource: str
    capacity: float
    unit: str


@dataclass(frozen=True, eq=False)
class Problem:
    """One search problem. The constructor checks every number; arrays are read-only float64.

    Attributes:
        options: ids of each layer's options.
        score: loss of quality of each option; lower is better.
        parent: index of the parent's own option in each layer.
        resources: a column per resource name.
        limits: bounds on sums of resources.
        rules: constraints on the choice itself. Names of limits and rules are unique.

    Raises:
        NonFiniteError: a score, resource or capacity is NaN or infinite.
        CoverageError: a layer has no option, or a column or rule does not have one number per option.
        SpecError: option ids, or names of limits and rules repeat, a parent index is outside its layer, a limit is on
            an unknown resource, or a rule on options that it does not support (rules.py).
    """

    options: tuple[tuple[str, ...], ...]
    score: Column
    parent: Choice
    resources: Mapping[str, Column]
    limits: tuple[Limit, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _check_options(self.options, self.parent)
        object.__setattr__(self, "score", _checked_column("score", self.score, self.options))
        columns = {name: _checked_column(name, column, self.options) for name, column in self.resources.items()}
        object.__setattr__(self, "resources", columns)
        _check_limits(self.limits, columns)
        check_rules(self.rules, self.options, self.parent)
        _check_names([part.name for part in (*self.limits, *self.rules)])

    def total(self, resource: str, choice: Sequence[int]) -> float:
        """Use of a resource, summed over layers."""
        return sum_chosen(self.resources[resource], choice)

    def total_score(self, choice: Sequence[int]) -> float:
        """Score, summed over layers."""
        return sum_chosen(self.score, choice)

    def use(self, choice: Sequence[int]) -> dict[str, float]:
        """Use of every limit's resource, by the name of the limit and in its unit."""
        return {limit.name: self.total(limit.resource, choice) for limit in self.limits}

    def feasible(self, choice: Sequence[int], tolerance: float = TOLERANCE) -> bool:
        """Whether every rule holds, and every limit up to `tolerance` relative to its capacity."""
        return not self.broken(choice, tolerance)

    def broken(self, choice: Sequence[int], tolerance: float = TOLERANCE) -> list[str]:
        """Names of the limits and rules that do not hold."""
        used = self.use(choice)
        over = [
            limit.name for limit in self.limits if used[limit.name] > limit.capacity + tolerance * abs(limit.capacity)
        ]
        return over + [rule.name for rule in self.rules if not rule.holds(choice)]

    def option_ids(self, choice: Sequence[int]) -> tuple[str, ...]:
        """The option ids of a choice, in layer order."""
        return tuple(ids[index] for ids, index in zip(self.options, choice, strict=True))

    def restrict(self, keep: Callable[[int, str], bool]) -> Self:
        """The same problem over the options for which `keep(layer, id)` holds, and the parent's own.

        If one option of an `AllOrNone` rule is removed, its other options and the rule are removed too.
        """
        selected = [
            [index for index, option in enumerate(ids) if index == parent_index or keep(layer, option)]
            for layer, (ids, parent_index) in enumerate(zip(self.options, self.parent, strict=True))
        ]
        kept = [rows.tolist() for rows in drop_broken(self.rules, selected)]

        def is_kept(rule: Rule) -> bool:
            return not isinstance(rule, AllOrNone) or all(option in kept[layer] for layer, option in rule.members)

        return replace(
            self,
            options=tuple(tuple(ids[index] for index in rows) for ids, rows in zip(self.options, kept, strict=True)),
            score=tuple(values[rows] for values, rows in zip(self.score, kept, strict=True)),
            parent=tuple(rows.index(parent_index) for rows, parent_index in zip(kept, self.parent, strict=True)),
            resources={
                name: tuple(values[rows] for values, rows in zip(column, kept, strict=True))
                for name, column in self.resources.items()
            },
            rules=tuple(rule.restricted(kept) for rule in self.rules if is_kept(rule)),
        )

    def with_limits(self, limits: Iterable[Limit]) -> Self:
        """The same options and rules under these limits instead."""
        return replace(self, limits=tuple(limits))

    def with_capacity(self, name: str, capacity: float) -> Self:
        """The same problem with another capacity of one limit."""
        moved = (replace(limit, capacity=capacity) if limit.name == name else limit for limit in self.limits)
        return self.with_limits(moved)

    def avoiding(self, choice: Sequence[int], max_shared_layers: int, name: str) -> Self:
        """The same problem with one more limit: at most `max_shared_layers` layers have the option of `choice`.

        An index of -1 in `choice` names no option.
        """
        shared = tuple(
            np.asarray(np.arange(len(ids)) == index, dtype=np.float64)
            for ids, index in zip(self.options, choice, strict=True)
        )
        limit = Limit(name, name, float(max_shared_layers), "layers")
        return replace(self, resources={**self.resources, name: shared}, limits=(*self.limits, limit))


@dataclass(frozen=True)
class Solution:
    """One architecture as a choice, with its score, its use of limits and its optimality gap.

    Attributes:
        choice: option index per layer, in its problem.
        options: option id per layer.
        objective: total score, recomputed from the choice.
        bound: lower bound on the score of all feasible choices.
        gap: (objective - bound) / (objective - sum of every layer's least score); 0 when both differences are 0. It is
            relative to the increase that the limits cause, so it does not depend on the zero of the score.
        optimal: proven optimal within the requested relative gap. False at the time limit, and for baselines (unless
            they reach every layer's least score).
        used: use of every limit, by its name and in its unit.
        slack: capacity less use, likewise.
        seconds: wall time of the search.
        method: name of the search method.
    """

    choice: Choice
    options: tuple[str, ...]
    objective: float
    bound: float
    gap: float
    optimal: bool
    used: dict[str, float]
    slack: dict[str, float]
    seconds: float
    method: str


def describe(
    problem: Problem,
    choice: Sequence[int],
    *,
    method: str,
    seconds: float,
    bound: float = -math.inf,
    optimal: bool = False,
) -> Solution:
    """The Solution of a choice. Recomputes score and uses and checks every limit and rule (DESIGN rule 6).

    Raises:
        RuntimeError: a check fails. This is a bug: a method returns only feasible choices.
    """
    used = problem.use(choice)
    if broken := problem.broken(choice):
        limits = ", ".join(
            f"{limit.name} {used[limit.name]!r} of {limit.capacity!r} {limit.unit}" for limit in problem.limits
        )
        raise RuntimeError(
            f"{method} returned a choice outside {', '.join(broken)} ({limits}); this is a mistake in "
            "puzzle_core.search"
        )
    objective = problem.total_score(choice)
    least = math.fsum(float(values.min()) for values in problem.score)
    bound = min(objective, max(bound, least))
    return Solution(
        choice=tuple(int(index) for index in choice),
        options=problem.option_ids(choice),
        objective=objective,
        bound=bound,
        gap=(objective - bound) / (objective - least) if objective > bound else 0.0,
        optimal=optimal or objective <= least,
        used=used,
        slack={limit.name: limit.capacity - used[limit.name] for limit in problem.limits},
        seconds=seconds,
        method=method,
    )


def sum_chosen(column: Column, choice: Sequence[int]) -> float:
    """The sum over layers of the chosen options' values."""
    assert len(column) == len(choice), "a choice has one option per layer"
    return math.fsum(map(np.ndarray.item, column, choice))  # several times as fast as a loop


def _check_options(options: tuple[tuple[str, ...], ...], parent: Choice) -> None:
    if not options:
        raise CoverageError("a search needs at least one layer, and got none")
    if len(parent) != len(options):
        raise SpecError(f"{len(options)} layers, but {len(parent)} parent options: give one index per layer")
    for layer, (ids, parent_index) in enumerate(zip(options, parent, strict=True)):
        if not ids:
            raise CoverageError(f"layer {layer} has no option: give at least the parent's own")
        if len(set(ids)) < len(ids):
            repeated = next(option for option in ids if ids.count(option) > 1)
            raise SpecError(f"layer {layer} lists {repeated!r} more than once: give every option once")
        if not 0 <= parent_index < len(ids):
            raise SpecError(f"layer {layer} has {len(ids)} options, and its parent index is {parent_index}")


def _checked_column(name: str, column: Column, options: tuple[tuple[str, ...], ...]) -> Column:
    """The column as read-only float64 arrays."""
    if len(column) != len(options):
        raise CoverageError(f"{name} covers {len(column)} layers of {len(options)}: give one array per layer")
    return tuple(_checked_array(name, layer, values, options[layer]) for layer, values in enumerate(column))


def _checked_array(name: str, layer: int, values: NDArray[np.float64], ids: tuple[str, ...]) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    if array.shape != (len(ids),):
        raise CoverageError(f"{name} of layer {layer} has shape {array.shape}, and the layer has {len(ids)} options")
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        place = f"{name} of layer {layer}, option {ids[wrong[0]]!r}"
        raise NonFiniteError(f"{place} is {array[wrong[0]]}: compute it again, or leave the option out of the search")
    array.setflags(write=False)
    return array


def _check_limits(limits: tuple[Limit, ...], resources: Mapping[str, Column]) -> None:
    for limit in limits:
        if limit.resource not in resources:
            known = ", ".join(sorted(resources)) or "none"
            raise SpecError(f"limit {limit.name!r} is on {limit.resource!r}, which no option has (known: {known})")
        if not math.isfinite(limit.capacity):
            raise NonFiniteError(
                f"the capacity of limit {limit.name!r} is {limit.capacity}: leave out a limit that is none"
            )


def _check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"two limits or rules are called {name!r}: give each its own name")
