"""The grouped-knapsack MIP of METHOD section 6, solved with HiGHS: exact, at every magnitude of scores and costs.

Method: the LP relaxation gives a bound and, for every option, the least excess over it of a choice with that option.
The MIP over the options with a small excess gives a choice. If all other options exceed the cost of that choice, it is
optimal. Otherwise the options that do not exceed it are added and the MIP is solved again.

The result is exact, because:
- Each layer's least cost and least use are subtracted as constants. The rest is scaled so that the largest cost and the
  headroom of every limit are SCALE: the solver's absolute tolerance of 1e-8 is then 1e-10 of either.
- If the optimum is very small relative to the largest cost (one layer can be worse by orders of magnitude), this
  tolerance is too coarse. Options that alone cost more than the optimum are then dropped, and the rest is solved
  again at its own scale.
- Options that no optimal choice needs are removed first (milp.py).
- The bound of the relaxation is computed here from its dual values. Any dual values give a valid bound.
- The cost of the choice is recomputed from the caller's numbers, and every limit and rule is checked.

Legend: L layers, J options of a layer, N columns of the model.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np

from puzzle_core.errors import SolveLimitError
from puzzle_core.search.effort import BY_NODES, Effort
from puzzle_core.search.milp import Model, build, keep_useful, program
from puzzle_core.search.problem import Choice, Column, Problem, sum_chosen
from puzzle_core.search.relaxation import INFEASIBLE, Relaxation, Relaxed, checked, new_solver, work_of
from puzzle_core.search.rules import drop_broken

PEAKED = 1e3
"""If the largest cost exceeds the optimum by this factor, the problem is solved again without the larger options."""

CORE = 2
"""Number of columns per layer in the first MIP."""

CUT = (highspy.HighsModelStatus.kTimeLimit, highspy.HighsModelStatus.kSolutionLimit)
"""How HiGHS ends at its seconds and at its nodes."""


@dataclass(frozen=True)
class Minimum:
    """A choice, its cost, and a lower bound on all costs. `proven`: it is optimal within the relative gap.

    `work` is that of its last solve, see `relaxation.work_of`.
    """

    choice: Choice
    cost: float
    bound: float
    proven: bool
    work: int = 0


def minimise(
    problem: Problem,
    costs: Column,
    *,
    effort: Effort = BY_NODES,
    relative_gap: float = 1e-6,
    start: Sequence[int] | None = None,
) -> Minimum | None:
    """The choice with the least sum of `costs` within limits and rules, or None if it is proven that none exists.

    Args:
        costs: shape (J,) per layer: the score, a resource, or zeros to check feasibility only.
        effort: the nodes or seconds of branching, at whose end the best choice so far is returned.
        relative_gap: relative to the cost above the sum of the layers' least costs.
        start: an initial choice; ignored if it is infeasible or has an option that was removed.

    Raises:
        SolveLimitError: the effort ended without a choice and without a proof of infeasibility.
        RuntimeError: the solver failed, or the recomputed cost differs from its result. This is a bug.
    """
    deadline = time.perf_counter() + effort.seconds
    base, extra = above_least(costs)
    kept = keep_useful(problem, costs)
    refining = False
    while kept is not None:
        model, unit = build(problem, extra, kept)
        known = math.inf
        if start is not None and problem.feasible(start):
            known = sum_chosen(extra, start) / unit
        scaled = _solve_core(model, effort, deadline, relative_gap, start, known)
        if scaled is None:
            break
        answer = _confirmed_extra(problem, extra, scaled, unit)
        if not scaled.proven or answer == 0.0 or model.cost.max() * unit <= PEAKED * answer:
            return Minimum(scaled.choice, base + answer, base + scaled.bound * unit, scaled.proven, scaled.work)
        cheap = [rows[values[rows] <= answer] for values, rows in zip(extra, kept, strict=True)]
        kept = drop_broken(problem.rules, cheap)
        start, refining = scaled.choice, True
    if refining:
        raise RuntimeError(f"HiGHS finds no choice, although it found {start} before")
    return None


def lower_bound(problem: Problem, costs: Column) -> float:
    """A lower bound on the sum of `costs` within limits and rules, from the relaxation; infinite if it is infeasible.

    It takes milliseconds and is usually within a thousandth of the optimum.
    """
    base, extra = above_least(costs)
    kept = keep_useful(problem, costs)
    if kept is None:
        return math.inf
    model, unit = build(problem, extra, kept)
    relaxed = Relaxation(model).solve()
    return math.inf if relaxed is None else base + relaxed.bound * unit


def above_least(costs: Column) -> tuple[float, Column]:
    """The sum of the layers' least costs, and the cost of each option above its layer's least."""
    least = [float(values.min()) for values in costs]
    return math.fsum(least), tuple(values - low for values, low in zip(costs, least, strict=True))


def _solve_core(
    model: Model, effort: Effort, deadline: float, relative_gap: float, start: Sequence[int] | None, known: float
) -> Minimum | None:
    """The MIP over the columns of small excess, extended until no other column can improve it. Costs are scaled.

    `known` is the cost of the start: if few columns can be in a better choice, these are the first that are tried.
    """
    relaxation = Relaxation(model)
    relaxed = relaxation.solve()
    if relaxed is None:
        return None
    columns = model.cost.size
    size = CORE * model.layers
    near = int((relaxed.excess <= known - relaxed.bound).sum())
    size = near if model.layers <= near <= CORE * size else size
    while True:
        window = np.partition(relaxed.excess, size - 1)[size - 1] if size < columns else math.inf
        minimum, outside = _solve_within(model, relaxed, window, effort, deadline, relative_gap, start)
        if minimum is not None:
            break
        if outside == math.inf:
            return None
        size *= 4
    if minimum.proven and outside < minimum.bound:
        window = minimum.cost - relaxed.bound
        minimum, outside = _solve_within(model, relaxed, window, effort, deadline, relative_gap, minimum.choice)
        assert minimum is not None, "the start fits"
    bound = min(minimum.bound, max(outside, relaxed.bound))
    return replace(minimum, bound=bound, work=minimum.work + relaxation.work)


def _solve_within(
    model: Model,
    relaxed: Relaxed,
    window: float,
    effort: Effort,
    deadline: float,
    relative_gap: float,
    start: Sequence[int] | None,
) -> tuple[Minimum | None, float]:
    """The best choice from the columns within the window (and the start's), and a lower bound on all others."""
    inside = relaxed.excess <= window
    if start is not None:
        inside |= model.columns_of(start)
    outside = relaxed.bound + float(relaxed.excess[~inside].min(initial=math.inf))
    return _run(model.only(inside), effort, deadline, relative_gap, start), outside


def _run(
    model: Model, effort: Effort, deadline: float, relative_gap: float, start: Sequence[int] | None
) -> Minimum | None:
    """Solve the scaled MIP. Costs and bound of the result are scaled."""
    rows = model.rows()
    settings: dict[str, bool | int | float | str] = {"mip_rel_gap": relative_gap, "mip_max_nodes": effort.nodes}
    if effort.seconds < math.inf:
        settings["time_limit"] = max(0.0, deadline - time.perf_counter())
    solver = new_solver(settings)
    checked(solver.passModel(program(model, rows, integer=True)), "reading the model")
    if start is not None:
        columns = np.flatnonzero(model.columns_of(start))
        if model.takes_every_layer(columns):
            solver.setSolution(columns.size, columns.astype(np.int32), np.ones(columns.size))
    checked(solver.run(), "solving")

    status, info = solver.getModelStatus(), solver.getInfo()
    effort.count(max(0, int(info.mip_node_count)), status == highspy.HighsModelStatus.kTimeLimit)
    if status in INFEASIBLE:
        return None
    if status not in (highspy.HighsModelStatus.kOptimal, *CUT):
        raise RuntimeError(f"HiGHS ended with {solver.modelStatusToString(status)}")
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise SolveLimitError(
            f"no architecture within the limits was found in {effort.text}, nor a proof that there is none: "
            "give the search more of them, fewer options or looser limits"
        )
    taken = np.asarray(solver.getSolution().col_value)[: model.cost.size] > 0.5
    proven, work = status == highspy.HighsModelStatus.kOptimal, work_of(model.cost.size, rows.lower.size, solver)
    return Minimum(model.choice_of(taken), info.objective_function_value, info.mip_dual_bound, proven, work)


def _confirmed_extra(problem: Problem, extra: Column, scaled: Minimum, unit: float) -> float:
    """Recompute the cost above the layers' least; check it against the solver's, and check limits and rules.

    Raises:
        RuntimeError: a check fails.
    """
    answer = sum_chosen(extra, scaled.choice)
    if abs(answer - scaled.cost * unit) > 1e-5 * unit:
        raise RuntimeError(f"HiGHS reports a cost of {scaled.cost * unit!r}, and its choice costs {answer!r}")
    if not problem.feasible(scaled.choice):
        broken, used = problem.broken(scaled.choice), problem.use(scaled.choice)
        raise RuntimeError(f"HiGHS returned a choice outside the limits or rules {broken}: it uses {used}")
    return answer
