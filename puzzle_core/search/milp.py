"""The model that the solver sees: the useful options, scaled, and its rows (METHOD section 6).

    minimise   sum cost[n] x[n]
    subject to sum of x over the columns that take an option of layer i   = 1             for every layer
               sum use[k, n] x[n]                                        <= SCALE         for every limit
               sum of x over the columns of layer i that take group g    <= y[g]          for every AtMostDistinct
               sum y[g]                                                  <= at_most

A column takes one option of one layer, or all members of an AllOrNone at once: one column for the whole variant.

Legend: L layers, J options of a layer, K limits, N columns x, M options taken by columns (M = N without an AllOrNone).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import highspy
import numpy as np
from numpy.typing import NDArray

from puzzle_core.search.problem import TOLERANCE, Choice, Column, Limit, Problem
from puzzle_core.search.rules import UNCOUNTED, AllOrNone, AtMostDistinct, drop_broken, tied_options

SCALE = 100.0
MOST_USE = 1e6 * SCALE
"""Larger scaled uses are cut to this, which is far over every limit too: HiGHS refuses coefficients from 1e15 on."""
DECIMALS = 10
"""Scaled costs are rounded, far below the tolerance, so that scores in another unit make the very same model."""

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class GroupLimit(NamedTuple):
    """An AtMostDistinct rule: the group of every option taken, (M,), and how many different ones there may be."""

    group: Indices
    at_most: int


class Rows(NamedTuple):
    """Rows of the model as entries (row, column, value) and bounds; columns from N on are y of AtMostDistinct rules."""

    row: Indices
    column: Indices
    value: Floats
    lower: Floats
    upper: Floats
    columns: int


@dataclass(frozen=True)
class Model:
    """What each column takes, (M,) entries in order of columns, with scaled costs (N,) and scaled uses (K, N)."""

    layers: int
    column: Indices
    layer: Indices
    option: Indices
    cost: Floats
    use: Floats
    distinct: tuple[GroupLimit, ...]

    def only(self, columns_N: Mask) -> Self:
        """The same model with these columns alone."""
        entries = columns_N[self.column]
        return replace(
            self,
            column=(np.cumsum(columns_N) - 1)[self.column[entries]],
            layer=self.layer[entries],
            option=self.option[entries],
            cost=self.cost[columns_N],
            use=self.use[:, columns_N],
            distinct=tuple(GroupLimit(rule.group[entries], rule.at_most) for rule in self.distinct),
        )

    def columns_of(self, choice: Sequence[int]) -> Mask:
        """The columns that a choice takes, (N,)."""
        other = np.asarray(choice)[self.layer] != self.option
        return np.asarray(np.bincount(self.column, weights=other, minlength=self.cost.size) == 0)

    def takes_every_layer(self, columns: Indices) -> bool:
        """Whether these columns, no two of them of one layer, leave no layer without an option."""
        return int(np.isin(self.column, columns).sum()) == self.layers

    def choice_of(self, columns_N: Mask) -> Choice:
        """The choice that columns stand for.

        Raises:
            RuntimeError: they do not take exactly one option of every layer.
        """
        entries = columns_N[self.column]
        layer = self.layer[entries]
        if not np.array_equal(np.sort(layer), np.arange(self.layers)):
            raise RuntimeError("HiGHS did not choose exactly one option in every layer")
        return tuple(int(option) for option in self.option[entries][np.argsort(layer)])

    def rows(self) -> Rows:
        """All rows, those of the layers first, then of the limits, then of the AtMostDistinct rules."""
        limits, columns = len(self.use), self.cost.size
        limit_row, limit_column = np.nonzero(self.use)
        row, column = [self.layer, self.layers + limit_row], [self.column, limit_column]
        value = [np.ones(self.layer.size), self.use[limit_row, limit_column]]
        upper = [np.ones(self.layers), np.full(limits, SCALE)]
        first = self.layers + limits
        for group, at_most in self.distinct:
            counted = group != UNCOUNTED
            groups, group = np.unique(group[counted], return_inverse=True)
            links, link = np.unique(self.layer[counted] * groups.size + group, return_inverse=True)
            group_columns = columns + np.arange(groups.size)
            row += [first + link, first + np.arange(links.size), np.full(groups.size, first + links.size)]
            column += [self.column[counted], group_columns[links % groups.size], group_columns]
            value += [np.ones(link.size), np.full(links.size, -1.0), np.ones(groups.size)]
            upper += [np.zeros(links.size), np.array([float(at_most)])]
            first, columns = first + links.size + 1, columns + groups.size
        lower = np.full(first, -highspy.kHighsInf)
        lower[: self.layers] = 1.0
        rows, places, values = np.concatenate(row), np.concatenate(column), np.concatenate(value)
        return Rows(rows, places, values, lower, np.concatenate(upper), columns)


def program(model: Model, rows: Rows, *, integer: bool) -> highspy.HighsLp:
    """The model as HiGHS takes it. Without `integer`, columns have no upper bound, which the rows imply."""
    order = np.lexsort((rows.column, rows.row))
    form = highspy.HighsLp()
    form.num_col_, form.num_row_ = rows.columns, rows.lower.size
    form.col_cost_ = np.concatenate([model.cost, np.zeros(rows.columns - model.cost.size)])
    form.col_lower_ = np.zeros(rows.columns)
    form.col_upper_ = np.full(rows.columns, 1.0 if integer else highspy.kHighsInf)
    if integer:
        form.integrality_ = [highspy.HighsVarType.kInteger] * rows.columns
    form.row_lower_, form.row_upper_ = rows.lower, rows.upper
    form.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    starts = np.cumsum(np.bincount(rows.row, minlength=rows.lower.size))
    form.a_matrix_.start_ = np.concatenate([[0], starts]).astype(np.int32)
    form.a_matrix_.index_ = rows.column[order].astype(np.int32)
    form.a_matrix_.value_ = rows.value[order]
    return form


def build(problem: Problem, extra: Column, kept: list[Indices]) -> tuple[Model, float]:
    """The scaled model over the options kept, and what one scaled unit of cost is worth.

    Args:
        extra: cost of every option above its layer's least, (J,) per layer.
    """
    sizes = [rows.size for rows in kept]
    layer, option = np.repeat(np.arange(len(kept)), sizes), np.concatenate(kept)
    column, taken = _columns(problem, layer, option)
    columns = int(column.max()) + 1

    def summed(values: Column) -> Floats:
        flat = np.concatenate([array[rows] for array, rows in zip(values, kept, strict=True)])
        return np.bincount(column, weights=flat, minlength=columns).astype(np.float64)

    use = []
    for limit in problem.limits:
        resource = problem.resources[limit.resource]
        above = tuple(values - values.min() for values in resource)
        use.append(np.minimum(summed(above) * (SCALE / (headroom(limit, resource) or 1.0)), MOST_USE))
    cost = summed(extra)
    unit = (float(cost.max()) or 1.0) / SCALE
    model = Model(
        layers=len(kept),
        column=column[taken],
        layer=layer[taken],
        option=option[taken],
        cost=np.round(cost / unit, DECIMALS),
        use=np.reshape(use, (len(use), columns)),
        distinct=tuple(_counted(problem, kept, taken)),
    )
    return model, unit


def _columns(problem: Problem, layer: Indices, option: Indices) -> tuple[Indices, Indices]:
    """The column of every option kept, (M,), and the order of options by column."""
    column = np.arange(layer.size)
    for rule in problem.rules:
        if isinstance(rule, AllOrNone):
            places = [np.flatnonzero((layer == i) & (option == j)) for i, j in rule.members]
            if all(place.size for place in places):
                column[np.concatenate(places)] = places[0]
    column = np.unique(column, return_inverse=True)[1]
    return column, np.argsort(column, kind="stable")


def _counted(problem: Problem, kept: list[Indices], taken: Indices) -> list[GroupLimit]:
    """The AtMostDistinct rules that options kept can break."""
    counted = []
    for rule in problem.rules:
        if isinstance(rule, AtMostDistinct):
            group = np.concatenate([groups[rows] for groups, rows in zip(rule.groups, kept, strict=True)])
            if np.setdiff1d(group, [UNCOUNTED]).size > rule.at_most:
                counted.append(GroupLimit(group[taken], rule.at_most))
    return counted


def headroom(limit: Limit, column: Column) -> float:
    """What a limit leaves when every layer takes its least of the column. Negative: the limit alone cannot hold.

    Half of the tolerance is granted here and the rest left to rounding, so that a capacity that was itself computed as
    a sum of uses can be met.
    """
    granted = 0.5 * TOLERANCE * abs(limit.capacity)
    return math.fsum([limit.capacity, granted, *(-float(values.min()) for values in column)])


def keep_useful(problem: Problem, costs: Column, beside: Sequence[int] | None = None) -> list[Indices] | None:
    """Indices of the options per layer that a best choice can need, or None when some layer has none.

    An option goes when it alone exceeds the headroom of a limit, or when another option of its layer costs no
    more, uses no more of any limited resource, and counts in no other group of an AtMostDistinct rule: the other option
    keeps every limit and rule and never costs more. This holds with limits made by `Problem.avoiding` too, since shared
    layers are a resource like any other. Members of an AllOrNone neither beat nor are beaten, and go when one of them
    goes. Of two equal options the parent's own stays, else the first. The options of `beside`, a choice, stay too, and
    beat no other: what stays is enough for a best choice without any of them.
    """
    columns = [problem.resources[limit.resource] for limit in problem.limits]
    room_K = np.array([headroom(limit, column) for limit, column in zip(problem.limits, columns, strict=True)])
    fitting, values = [], []
    for layer, cost in enumerate(costs):
        values_CJ = np.stack([cost, *(column[layer] for column in columns)])
        above_KJ = values_CJ[1:] - values_CJ[1:].min(axis=1, keepdims=True)
        values.append(values_CJ)
        fitting.append(np.flatnonzero((above_KJ <= room_K[:, None]).all(axis=0)))
    tied = tied_options(problem.rules, [cost.size for cost in costs])
    for layer, option in enumerate(beside or ()):
        tied[layer][option] = True
    counted = [rule.groups for rule in problem.rules if isinstance(rule, AtMostDistinct)]
    kept = []
    for layer, rows in enumerate(drop_broken(problem.rules, fitting)):
        if not rows.size:
            return None
        groups_RJ = np.reshape([groups[layer][rows] for groups in counted], (len(counted), rows.size))
        rank_J = np.where(rows == problem.parent[layer], -1, rows)
        kept.append(rows[undominated(values[layer][:, rows], groups_RJ, tied[layer][rows], rank_J)])
    return kept


def undominated(values_CJ: Floats, groups_RJ: Indices, tied_J: Mask, rank_J: Indices) -> Mask:
    """Which options no other may replace; of equal ones the lower rank stays."""
    may = (values_CJ[:, :, None] <= values_CJ[:, None, :]).all(axis=0)
    if len(groups_RJ):
        same = groups_RJ[:, :, None] == groups_RJ[:, None, :]
        may &= (same | (groups_RJ == UNCOUNTED)[:, :, None]).all(axis=0)
    may &= ~(tied_J[:, None] | tied_J[None, :])
    beats = may & (~may.T | (rank_J[:, None] < rank_J[None, :]))
    return np.asarray(~beats.any(axis=0))
