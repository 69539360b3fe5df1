"""The grouped-knapsack MIP of METHOD section 6 in HiGHS: one option per layer, least cost within every limit.

What makes the answer exact at every magnitude of scores and costs:
- Each layer's least cost and least use go out as constants. What is left is scaled so that the largest cost, and the
  headroom of every limit, are SCALE: the solver's absolute tolerance of 1e-8 is then 1e-10 of either.
- Where the answer is so small beside the largest cost that even this is coarse (one layer can be worse by orders of
  magnitude), options that alone cost more than the answer are dropped, and the rest is solved again at its own scale.
- Options that no best choice needs are left out before: too large for a limit whatever the other layers take, or no
  better than another option of their layer in cost and in every limited resource.
- The choice is recomputed from the caller's numbers, and every limit compared.

Legend: L layers, J options of a layer, K limits, N columns of the model: the options kept, layer after layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from puzzle_core.errors import TimeLimitError
from puzzle_core.search.problem import TOLERANCE, Choice, Column, Limit, Problem

SCALE = 100.0
DECIMALS = 10
"""Scaled costs are rounded, far below the tolerance, so that scores in another unit make the very same model."""

PEAKED = 1e3
"""A largest cost above this many times the answer is solved again without the options that cause it."""

SETTINGS: dict[str, bool | int | float | str] = {
    "output_flag": False,
    "threads": 1,
    "parallel": "off",
    "random_seed": 0,
    "mip_abs_gap": 0.0,
    "mip_feasibility_tolerance": 1e-8,
    "primal_feasibility_tolerance": 1e-9,
    "dual_feasibility_tolerance": 1e-10,
    "small_matrix_value": 1e-12,
}
"""HiGHS drops improvements below its tolerances, in presolve too, so they are all well below its defaults."""

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Minimum:
    """A choice, its cost, and a bound on every choice's cost. `proven`: it is the best, within the relative gap."""

    choice: Choice
    cost: float
    bound: float
    proven: bool


@dataclass(frozen=True)
class _Model:
    """The options kept, (N,) each, with scaled costs (N,) and scaled uses (K, N)."""

    layer: Indices
    option: Indices
    cost: Floats
    use: Floats


def minimise(
    problem: Problem,
    costs: Column,
    *,
    time_limit_s: float = 60.0,
    relative_gap: float = 1e-6,
    start: Sequence[int] | None = None,
) -> Minimum | None:
    """The choice with the least sum of `costs` within the limits, or None when it is proved that none fits.

    Args:
        costs: shape (J,) per layer: the score, or a resource, or zeros to ask only whether the limits can hold.
        time_limit_s: seconds for one solve; when they end, the best choice so far is returned.
        relative_gap: relative to the cost above the sum of every layer's least.
        start: a choice to start from; ignored when it does not fit or names an option that was left out.

    Raises:
        TimeLimitError: the time limit ended with neither a choice nor a proof.
        RuntimeError: the solver failed, or recomputation does not confirm what it returned: our own mistake.
    """
    least = [float(values.min()) for values in costs]
    extra = tuple(values - low for values, low in zip(costs, least, strict=True))
    kept = keep_useful(problem, costs)
    refining = False
    while kept is not None:
        largest = max(float(values[rows].max()) for values, rows in zip(extra, kept, strict=True)) or 1.0
        scaled = _run(_build(problem, extra, kept, largest), time_limit_s, relative_gap, start)
        if scaled is None:
            break
        answer = _confirmed_extra(problem, extra, scaled, largest / SCALE)
        if not scaled.proven or answer == 0.0 or largest <= PEAKED * answer:
            base = math.fsum(least)
            return Minimum(scaled.choice, base + answer, base + scaled.bound * largest / SCALE, scaled.proven)
        kept = [rows[values[rows] <= answer] for values, rows in zip(extra, kept, strict=True)]
        start, refining = scaled.choice, True
    if refining:
        raise RuntimeError(f"HiGHS finds no choice where it has found {start} before")
    return None


def headroom(limit: Limit, column: Column) -> float:
    """What a limit leaves when every layer takes its least of the column. Negative: the limit alone cannot hold.

    Half of the tolerance is granted here and the rest left to rounding, so that a capacity that was itself computed as
    a sum of uses can be met.
    """
    granted = 0.5 * TOLERANCE * abs(limit.capacity)
    return math.fsum([limit.capacity, granted, *(-float(values.min()) for values in column)])


def keep_useful(problem: Problem, costs: Column) -> list[Indices] | None:
    """Indices of the options per layer that a best choice can need, or None when some layer has none.

    An option goes when it alone exceeds the headroom of a limit, or when another of its layer costs no more and uses no
    more of any limited resource: swapping that one in keeps every limit and never costs more. This holds with limits
    made by `Problem.avoiding` too, since the layers shared are a resource like any other. Of two equal options the
    parent's own stays, else the first.
    """
    columns = [problem.resources[limit.resource] for limit in problem.limits]
    room_K = np.array([headroom(limit, column) for limit, column in zip(problem.limits, columns, strict=True)])
    kept = []
    for layer, (cost, own) in enumerate(zip(costs, problem.parent, strict=True)):
        values_CJ = np.stack([cost, *(column[layer] for column in columns)])
        above_KJ = values_CJ[1:] - values_CJ[1:].min(axis=1, keepdims=True)
        rows = np.flatnonzero((above_KJ <= room_K[:, None]).all(axis=0))
        if not rows.size:
            return None
        kept.append(rows[_undominated(values_CJ[:, rows], np.where(rows == own, -1, rows))])
    return kept


def _undominated(values_CJ: Floats, rank_J: Indices) -> NDArray[np.bool_]:
    """Which options no other beats; of equal ones the lower rank wins."""
    no_worse = (values_CJ[:, :, None] <= values_CJ[:, None, :]).all(axis=0)
    beats = no_worse & (~no_worse.T | (rank_J[:, None] < rank_J[None, :]))
    return np.asarray(~beats.any(axis=0))


def _build(problem: Problem, extra: Column, kept: list[Indices], largest: float) -> _Model:
    """The scaled model over the options kept; `largest` is the greatest of their costs."""

    def flat(column: Column) -> Floats:
        return np.concatenate([values[rows] for values, rows in zip(column, kept, strict=True)])

    use = []
    for limit in problem.limits:
        column = problem.resources[limit.resource]
        above = tuple(values - values.min() for values in column)
        use.append(flat(above) * (SCALE / (headroom(limit, column) or 1.0)))
    return _Model(
        layer=np.repeat(np.arange(len(kept)), [rows.size for rows in kept]),
        option=np.concatenate(kept),
        cost=np.round(flat(extra) * (SCALE / largest), DECIMALS),
        use=np.reshape(use, (len(use), sum(rows.size for rows in kept))),
    )


def _program(model: _Model) -> highspy.HighsLp:
    """HiGHS's own form: L rows "exactly one option", then K rows "at most SCALE", by row."""
    layers, limits, columns = int(model.layer[-1]) + 1, len(model.use), model.cost.size
    limit_row, limit_column = np.nonzero(model.use)
    entries = np.concatenate([np.bincount(model.layer), np.bincount(limit_row, minlength=limits)])
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = columns, layers + limits
    program.col_cost_ = model.cost
    program.col_lower_, program.col_upper_ = np.zeros(columns), np.ones(columns)
    program.integrality_ = [highspy.HighsVarType.kInteger] * columns
    program.row_lower_ = np.concatenate([np.ones(layers), np.full(limits, -highspy.kHighsInf)])
    program.row_upper_ = np.concatenate([np.ones(layers), np.full(limits, SCALE)])
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.concatenate([[0], np.cumsum(entries)]).astype(np.int32)
    program.a_matrix_.index_ = np.concatenate([np.arange(columns), limit_column]).astype(np.int32)
    program.a_matrix_.value_ = np.concatenate([np.ones(columns), model.use[limit_row, limit_column]])
    return program


def _run(model: _Model, time_limit_s: float, relative_gap: float, start: Sequence[int] | None) -> Minimum | None:
    """Solve the scaled model; costs and bound are scaled too."""
    solver = highspy.Highs()
    for name, value in {**SETTINGS, "time_limit": time_limit_s, "mip_rel_gap": relative_gap}.items():
        _checked(solver.setOptionValue(name, value), f"setting {name}")
    _checked(solver.passModel(_program(model)), "reading the model")
    if start is not None:
        solution = highspy.HighsSolution()
        solution.col_value = (model.option == np.asarray(start)[model.layer]).astype(np.float64)
        solver.setSolution(solution)
    _checked(solver.run(), "solving")

    status, info = solver.getModelStatus(), solver.getInfo()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
        return None
    if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit):
        raise RuntimeError(f"HiGHS ended with {solver.modelStatusToString(status)}")
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise TimeLimitError(
            f"no architecture within the limits was found in {time_limit_s:g} s, nor a proof that there is none: "
            "give the search more time, fewer options or looser limits"
        )
    taken = np.asarray(solver.getSolution().col_value) > 0.5
    if not np.array_equal(model.layer[taken], np.arange(model.layer[-1] + 1)):
        raise RuntimeError("HiGHS did not choose exactly one option in every layer")
    choice = tuple(int(index) for index in model.option[taken])
    proven = status == highspy.HighsModelStatus.kOptimal
    return Minimum(choice, info.objective_function_value, info.mip_dual_bound, proven)


def _checked(status: highspy.HighsStatus, doing: str) -> None:
    if status == highspy.HighsStatus.kError:
        raise RuntimeError(f"HiGHS failed in {doing}")


def _confirmed_extra(problem: Problem, extra: Column, scaled: Minimum, unit: float) -> float:
    """Cost above every layer's least, recomputed; it must be what the solver says, and every limit must hold."""
    answer = math.fsum(float(values[index]) for values, index in zip(extra, scaled.choice, strict=True))
    if abs(answer - scaled.cost * unit) > 1e-7 * SCALE * unit:
        raise RuntimeError(f"HiGHS reports a cost of {scaled.cost * unit!r}, and its choice costs {answer!r}")
    if not problem.feasible(scaled.choice):
        raise RuntimeError(f"HiGHS returned a choice outside the limits: it uses {problem.use(scaled.choice)}")
    return answer
