"""The best over several problems that share score and rules: one per batch size, or per hardware setting.

Exact, and most problems are never solved: a problem whose relaxation already scores worse than another's answer is
left out with that bound as the reason (METHOD section 6, "solve for each b and keep the best").
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from puzzle_core.errors import InfeasibleError, SolveLimitError, SpecError
from puzzle_core.search.effort import BY_NODES, Effort
from puzzle_core.search.highs import lower_bound
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.mip import solve_or_none
from puzzle_core.search.problem import Problem, Solution, describe

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Alternative:
    """What is known of one of several problems.

    Attributes:
        bound: no choice within its limits scores less; infinite where none fits.
        solution: its best choice; None where the bound was enough to leave it out, or the effort ended without one.
        infeasible: why no choice fits; None where one may.
        undecided: whether it may have a better choice than the answer: the effort ended before that was known.
    """

    bound: float
    solution: Solution | None = None
    infeasible: InfeasibleError | None = None
    undecided: bool = False


@dataclass(frozen=True)
class Best(Generic[Key]):
    """The best over several problems.

    Attributes:
        key: the problem it is the answer to.
        solution: its best choice; bound and proof hold for all problems.
        alternatives: what is known of every problem, this one too, in the caller's order.
    """

    key: Key
    solution: Solution
    alternatives: dict[Key, Alternative]


def solve_best(problems: Mapping[Key, Problem], *, effort: Effort = BY_NODES, relative_gap: float = 1e-6) -> Best[Key]:
    """The best choice of all problems. Of those that score the same, within the relative gap, the first key's wins.

    `effort` holds for each problem that is solved.

    Raises:
        SpecError: there is no problem.
        InfeasibleError: no problem has an answer; its text has a reason for every key.
        SolveLimitError: the effort ended everywhere without a choice, and not everywhere with a proof.
    """
    if not problems:
        raise SpecError("a search needs at least one problem, and got none")
    bounds = {key: lower_bound(problem, problem.score) for key, problem in problems.items()}
    race = BoundedRace(problems, bounds, effort, relative_gap)
    race.run()
    infeasible = {
        key: explain_infeasible(problems[key], effort=effort) for key, bound in race.bounds.items() if bound == math.inf
    }
    winner = race.winner()
    if winner is None:
        unknown = [key for key in problems if key not in infeasible]
        if unknown:
            raise SolveLimitError(
                f"no architecture was found in {effort.text} for any of {', '.join(map(str, problems))}, nor a "
                f"proof that there is none for {', '.join(map(str, unknown))}: give the search more of them"
            )
        lines = "\n".join(f"{key}: {error}" for key, error in infeasible.items())
        error = InfeasibleError(f"none of {len(problems)} problems has an answer:\n{lines}")
        error.conflicts = tuple(conflict for reason in infeasible.values() for conflict in reason.conflicts)
        raise error
    undecided = race.undecided(winner)
    alternatives = {
        key: Alternative(race.bounds[key], race.solutions.get(key), infeasible.get(key), key in undecided)
        for key in problems
    }
    return Best(winner, race.answer(winner), alternatives)


class BoundedRace(Generic[Key]):
    """Solves problems in order of their bounds until no other can win.

    Attributes:
        bounds: what no choice of a problem scores below, as far as known by now.
        solutions: the solutions so far; a caller may add a solution that it knows to be best before `run`.
    """

    def __init__(
        self, problems: Mapping[Key, Problem], bounds: Mapping[Key, float], effort: Effort, relative_gap: float
    ) -> None:
        self.problems = problems
        self.bounds = dict(bounds)
        self.solutions: dict[Key, Solution] = {}
        self._effort, self._relative_gap = effort, relative_gap
        first = next(iter(problems.values()))
        self._least = math.fsum(float(values.min()) for values in first.score)

    def run(self) -> None:
        """Solve what can still win, the most promising first."""
        for key in sorted(self.problems, key=lambda key: self.bounds[key]):
            if key not in self.solutions and self.may_win(key):
                self._solve(key)

    def may_win(self, key: Key) -> bool:
        """Whether a problem can beat the best solution so far, or equal it and come first."""
        if self.bounds[key] == math.inf:
            return False
        leader = self.winner()
        if leader is None:
            return True
        order = list(self.problems)
        sign = 1 if order.index(key) < order.index(leader) else -1
        objective = self.solutions[leader].objective
        limit = objective + sign * self._tolerance(objective)
        return self.bounds[key] <= limit if sign > 0 else self.bounds[key] < limit

    def winner(self) -> Key | None:
        """The first key whose solution is as good as any, within the relative gap."""
        best = min((solution.objective for solution in self.solutions.values()), default=math.inf)
        good = best + self._tolerance(best)
        return next(
            (key for key in self.problems if key in self.solutions and self.solutions[key].objective <= good), None
        )

    def answer(self, winner: Key) -> Solution:
        """The winner's solution, with a bound and a proof that hold for all problems."""
        solution = self.solutions[winner]
        undecided = self.undecided(winner)
        if not undecided:
            return solution
        bound = min(solution.bound, *(self.bounds[key] for key in undecided))
        return describe(
            self.problems[winner], solution.choice, method=solution.method, seconds=solution.seconds, bound=bound
        )

    def undecided(self, winner: Key) -> list[Key]:
        """The other problems that have no proof and may have a better choice than the winner's."""
        proven = {key for key, solution in self.solutions.items() if solution.optimal}
        return [key for key in self.problems if key != winner and key not in proven and self.may_win(key)]

    def _tolerance(self, objective: float) -> float:
        """How far two scores may lie apart and count as the same."""
        return self._relative_gap * (objective - self._least) if objective < math.inf else 0.0

    def _solve(self, key: Key) -> None:
        try:
            solution = solve_or_none(self.problems[key], effort=self._effort, relative_gap=self._relative_gap)
        except SolveLimitError:
            return
        if solution is None:
            self.bounds[key] = math.inf
        else:
            self.bounds[key] = min(max(self.bounds[key], solution.bound), solution.objective)
            self.solutions[key] = solution
