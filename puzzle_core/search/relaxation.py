"""The relaxation of the model: bounds from dual values, solved again from its own basis when a little changes.

By weak duality every lambda <= 0 on the rows "at most" gives the bound lambda . b + sum min(0, reduced cost), and a
column in use adds its reduced cost to it. So any dual values give a valid bound, and from a basis that is kept, a
relaxation with a column less or a limit looser takes a few iterations.

Legend: L layers, K limits, N columns of the model.
"""

from dataclasses import dataclass

import highspy
import numpy as np

from puzzle_core.search.milp import DECIMALS, SCALE, Floats, Mask, Model, program

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
    "mip_heuristic_run_feasibility_jump": False,
    "mip_allow_restart": False,
}
"""HiGHS ignores improvements below its tolerances, also in presolve, so all are well below its defaults.

Without feasibility jump and restarts of the tree, most of these solves take less time, small ones a third.
"""

INFEASIBLE = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)


@dataclass(frozen=True)
class Relaxed:
    """Lower bounds on costs: `bound` for all choices, `bound + excess[n]` for those with column n, (N,).

    Both are scaled, and `excess` is infinite for a forbidden column. `share` is how much of every column the relaxation
    takes, (N,).
    """

    bound: float
    excess: Floats
    share: Floats


class Relaxation:
    """The relaxation of one model.

    Attributes:
        work: columns times rows and iterations of the first solve: about what one more search of this model takes.
    """

    def __init__(self, model: Model) -> None:
        self._rows, columns = model.rows(), model.cost.size
        self._layers, self._limits, self._columns = model.layers, len(model.use), columns
        self._cost = np.concatenate([model.cost, np.zeros(self._rows.columns - columns)])
        self._solver = new_solver({"solver": "simplex"})
        checked(self._solver.passModel(program(model, self._rows, integer=False)), "reading the relaxation")
        checked(self._solver.run(), "solving the relaxation")
        self._basis, self._forbidden_N = self._solver.getBasis(), np.zeros(columns, dtype=bool)
        self.work = work_of(columns, self._rows.lower.size, self._solver)

    def solve(self, forbidden_N: Mask | None = None, upper_K: Floats | None = None) -> Relaxed | None:
        """The relaxation without some columns, or with other bounds of the limits; None if it is infeasible.

        Args:
            forbidden_N: columns that may not be taken; none by default.
            upper_K: bound of every limit in the units of the model; SCALE by default.
        """
        upper = self._rows.upper.copy()
        if forbidden_N is not None or upper_K is not None:
            upper[self._layers : self._layers + self._limits] = SCALE if upper_K is None else upper_K
            self._change(np.zeros(self._columns, dtype=bool) if forbidden_N is None else forbidden_N, upper)
        if self._solver.getModelStatus() in INFEASIBLE:
            return None
        solution, at_most = self._solver.getSolution(), self._rows.lower < self._rows.upper
        dual = np.asarray(solution.row_dual)
        dual[at_most] = np.minimum(dual[at_most], 0.0)
        entries = self._rows.value * dual[self._rows.row]
        reduced = self._cost - np.bincount(self._rows.column, weights=entries, minlength=self._cost.size)
        if forbidden_N is not None:
            reduced[: self._columns][forbidden_N] = np.inf
        rounding = self._layers * 10.0**-DECIMALS
        bound = float(dual @ upper + np.minimum(reduced, 0.0).sum()) - rounding
        share = np.asarray(solution.col_value)[: self._columns]
        return Relaxed(max(bound, 0.0), np.maximum(reduced[: self._columns], 0.0), share)

    def _change(self, forbidden_N: Mask, upper: Floats) -> None:
        columns = np.flatnonzero(forbidden_N != self._forbidden_N).astype(np.int32)
        limits = np.arange(self._layers, self._layers + self._limits, dtype=np.int32)
        ends, lowest = np.where(forbidden_N[columns], 0.0, highspy.kHighsInf), np.full(limits.size, -highspy.kHighsInf)
        if columns.size:
            zeros = np.zeros(columns.size)
            checked(self._solver.changeColsBounds(columns.size, columns, zeros, ends), "forbidding columns")
        if limits.size:
            checked(self._solver.changeRowsBounds(limits.size, limits, lowest, upper[limits]), "moving limits")
        self._forbidden_N = forbidden_N
        checked(self._solver.setBasis(self._basis), "taking the basis")
        checked(self._solver.run(), "solving the relaxation again")


def new_solver(settings: dict[str, bool | int | float | str]) -> highspy.Highs:
    """A solver with our settings and these."""
    solver = highspy.Highs()
    for name, value in {**SETTINGS, **settings}.items():
        checked(solver.setOptionValue(name, value), f"setting {name}")
    return solver


def checked(status: highspy.HighsStatus, action: str) -> None:
    """Refuse to go on after an error of the solver.

    Raises:
        RuntimeError: HiGHS failed. This is a bug.
    """
    if status == highspy.HighsStatus.kError:
        raise RuntimeError(f"HiGHS failed in {action}")


def work_of(columns: int, rows: int, solver: highspy.Highs) -> int:
    """A measure of the work of a solve that does not depend on the machine: columns times rows and iterations."""
    return columns * (rows + int(solver.getInfo().simplex_iteration_count))
