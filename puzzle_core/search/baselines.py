"""The searches that the exact one is compared with (METHOD section 6).

Each returns a Solution that holds every limit and rule, or raises. They prove nothing, so the bound they report is no
more than the sum of every layer's least score. Variants that span layers are for the exact search alone: greedy and
random never take a member of an AllOrNone.

Legend: L layers, J options of a layer, K limits.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from puzzle_core.errors import InfeasibleError, SpecError
from puzzle_core.search.effort import BY_NODES, Effort
from puzzle_core.search.highs import minimise
from puzzle_core.search.infeasible import explain_infeasible
from puzzle_core.search.problem import TOLERANCE, Choice, Problem, Solution, describe
from puzzle_core.search.rules import UNCOUNTED, AtMostDistinct, tied_options

ATTEMPTS = 20
"""How often a random descent that is stuck outside the limits starts again from the parent."""

ROUNDING = 1e-12
"""A step must change a use by more than this part of its span, or it is rounding and no step."""

UNCHOSEN = -1
Influence = Sequence[Sequence[float]]
"""By first layer and number of layers less one, how much these layers change the hidden state."""

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def greedy(problem: Problem) -> Solution:
    """Budgets split evenly; layers in ascending order of mean score; each takes its best option within its budget.

    What a layer leaves rolls to the next. Where no option fits, the one with the smallest overdraft is taken (the worst
    over the limits, relative to a layer's even share), and the deficit rolls. The groups of an
    AtMostDistinct rule go to the layers that come first; later layers choose among them.

    Raises:
        InfeasibleError: the deficit was not made up in the end, or a rule leaves a layer without an option. That alone
            does not mean that no choice fits.
    """
    started = time.perf_counter()
    layers = len(problem.options)
    share_K = np.array([limit.capacity / layers for limit in problem.limits])
    budget_K = np.zeros_like(share_K)
    choice = [UNCHOSEN] * layers
    for layer in sorted(range(layers), key=lambda index: float(problem.score[index].mean())):
        allowed_J = _allowed_next(problem, choice, layer)
        if not allowed_J.any():
            raise InfeasibleError(
                f"greedy search left layer {layer} no option that the rules allow: the exact search may still find an "
                "architecture, or say which limit or rule to loosen"
            )
        budget_K += share_K
        use_KJ = _limited_use(problem, layer)
        overdraft_J = _worst((use_KJ - budget_K[:, None]) / _nonzero(np.abs(share_K))[:, None])
        fits_J = allowed_J & (overdraft_J <= TOLERANCE)
        wanted_J = np.where(fits_J, problem.score[layer], np.inf) if fits_J.any() else overdraft_J
        wanted_J = np.where(allowed_J, wanted_J, np.inf)
        choice[layer] = int(wanted_J.argmin())
        budget_K -= use_KJ[:, choice[layer]]
    if not problem.feasible(choice):
        raise InfeasibleError(
            f"greedy search ended outside the limits ({_uses(problem, tuple(choice))}): the exact search may still "
            "find an architecture, or say which limit to raise"
        )
    return describe(problem, choice, method="greedy", seconds=time.perf_counter() - started)


def uniform(problem: Problem) -> Solution:
    """The same option in every layer: the one with the best total score that fits.

    Raises:
        InfeasibleError: no option that every layer has fits when taken in all of them.
    """
    started = time.perf_counter()
    shared = [option for option in problem.options[0] if all(option in ids for ids in problem.options)]
    choices = [tuple(ids.index(option) for ids in problem.options) for option in shared]
    fitting = [choice for choice in choices if problem.feasible(choice)]
    if not fitting:
        raise InfeasibleError(
            f"no option taken in every layer holds the limits ({len(shared)} are available in every layer): "
            "the exact search, which mixes options, may still find an architecture"
        )
    best = min(fitting, key=problem.total_score)
    return describe(problem, best, method="uniform", seconds=time.perf_counter() - started)


def drop_layers(problem: Problem, influence: Influence, empty: str, together: bool) -> Solution:
    """The parent without the fewest layers that holds the limits; those of least influence are dropped.

    Args:
        influence: `influence[i][n]` is that of layers i to i+n together.
        empty: the option of a layer that is dropped.
        together: drop a run of layers, by the influence of the run; else single layers, by their own.

    Raises:
        InfeasibleError: no number of layers that may be dropped is enough.
    """
    started = time.perf_counter()
    layers = range(len(problem.options))
    droppable = [layer for layer in layers if empty in problem.options[layer]]
    least_first = sorted(droppable, key=lambda layer: influence[layer][0])
    for count in range(len(droppable) + 1):
        dropped = [set(least_first[:count])]
        if together and count:
            firsts = sorted(layers[: len(layers) - count + 1], key=lambda first: influence[first][count - 1])
            dropped = [run for first in firsts if (run := set(range(first, first + count))) <= {*droppable}]
        for run in dropped:
            choice = list(problem.parent)
            for layer in run:
                choice[layer] = problem.options[layer].index(empty)
            if problem.feasible(choice):
                return describe(problem, choice, method="depth", seconds=time.perf_counter() - started)
    raise InfeasibleError(
        f"no limits hold for the parent without layers: {len(droppable)} of {len(layers)} may be dropped (those with a "
        f"score of {empty}), and the others alone use too much: other searches may still find an architecture"
    )


def maximise(problem: Problem, resource: str, *, effort: Effort = BY_NODES, relative_gap: float = 1e-6) -> Solution:
    """The choice within limits and rules with the most of a resource, parameter bytes say; scores are not looked at.

    Raises:
        SpecError: there is no such resource.
        InfeasibleError, SolveLimitError: as `mip.solve`.
    """
    started = time.perf_counter()
    if resource not in problem.resources:
        raise SpecError(
            f"there is no resource {resource!r} to maximise (known: {', '.join(sorted(problem.resources))})"
        )
    negated = tuple(-values for values in problem.resources[resource])
    minimum = minimise(problem, negated, effort=effort, relative_gap=relative_gap)
    if minimum is None:
        raise explain_infeasible(problem, effort=effort)
    return describe(problem, minimum.choice, method=f"maximise {resource}", seconds=time.perf_counter() - started)


def random_choice(problem: Problem, seed: int) -> Solution:
    """A random choice that uses the budget; scores are not looked at.

    From the parent, random layers take random options with less overdraft in total until every limit holds; then random
    layers take random options with more use in total while one fits. An AtMostDistinct rule allows each walk random
    groups; a layer whose parent option has another group starts from its first allowed option.

    Raises:
        InfeasibleError: no descent out of ATTEMPTS came within limits and rules.
    """
    started = time.perf_counter()
    random = np.random.default_rng(seed)
    choice = problem.parent
    for _ in range(ATTEMPTS):
        allowed = _random_groups(problem, random)
        if not all(allowed_J.any() for allowed_J in allowed):
            continue
        choice = _random_walk(problem, allowed, random)
        if problem.feasible(choice):
            return describe(problem, choice, method="random", seconds=time.perf_counter() - started)
    raise InfeasibleError(
        f"{ATTEMPTS} random descents from the parent ended outside the limits ({_uses(problem, choice)}): the exact "
        "search may still find an architecture, or say which limit to raise"
    )


def _allowed_next(problem: Problem, choice: list[int], layer: int) -> Mask:
    """Options of a layer that the rules allow beside what is chosen; no member of an AllOrNone."""
    allowed_J = ~tied_options(problem.rules, [len(ids) for ids in problem.options])[layer]
    for rule in problem.rules:
        if isinstance(rule, AtMostDistinct):
            chosen = [
                int(groups[index]) for groups, index in zip(rule.groups, choice, strict=True) if index != UNCHOSEN
            ]
            groups = set(chosen) - {UNCOUNTED}
            if len(groups) >= rule.at_most:
                allowed_J &= np.isin(rule.groups[layer], [*groups, UNCOUNTED])
    return allowed_J


def _random_groups(problem: Problem, random: np.random.Generator) -> list[Mask]:
    """Options per layer of as many random groups as every AtMostDistinct rule allows; no member of an AllOrNone."""
    allowed = [~tied_J for tied_J in tied_options(problem.rules, [len(ids) for ids in problem.options])]
    for rule in problem.rules:
        if isinstance(rule, AtMostDistinct):
            groups = random.permutation(np.setdiff1d(np.concatenate(rule.groups), [UNCOUNTED]))[: rule.at_most]
            for allowed_J, groups_J in zip(allowed, rule.groups, strict=True):
                allowed_J &= np.isin(groups_J, [*groups, UNCOUNTED])
    return allowed


def _random_walk(problem: Problem, allowed: list[Mask], random: np.random.Generator) -> Choice:
    """Down until no random step lessens the overdraft, then up while one fits; uses are relative to a limit's span."""
    use_LKJ = [_limited_use(problem, layer) for layer in range(len(problem.options))]
    span_K = _nonzero(np.sum([use_KJ.max(axis=1) - use_KJ.min(axis=1) for use_KJ in use_LKJ], axis=0))
    use_LKJ = [use_KJ / span_K[:, None] for use_KJ in use_LKJ]
    room_K = np.array([limit.capacity + 0.5 * TOLERANCE * abs(limit.capacity) for limit in problem.limits]) / span_K
    choice = [
        parent if mask[parent] else int(mask.argmax()) for parent, mask in zip(problem.parent, allowed, strict=True)
    ]

    def overdraft(used_KJ: Floats) -> Floats:
        return np.asarray(np.maximum(used_KJ - room_K[:, None], 0.0).sum(axis=0))

    def cheaper(now_K1: Floats, used_KJ: Floats) -> Mask:
        return overdraft(used_KJ) < overdraft(now_K1) - ROUNDING

    def dearer_and_fits(now_K1: Floats, used_KJ: Floats) -> Mask:
        return np.asarray((used_KJ.sum(axis=0) > now_K1.sum(axis=0) + ROUNDING) & (overdraft(used_KJ) == 0.0))

    while _random_step(choice, allowed, use_LKJ, random, cheaper):
        pass
    while _random_step(choice, allowed, use_LKJ, random, dearer_and_fits):
        pass
    return tuple(choice)


def _random_step(
    choice: list[int],
    allowed: list[Mask],
    use_LKJ: list[Floats],
    random: np.random.Generator,
    accepts: Callable[[Floats, Floats], Mask],
) -> bool:
    """Change one random layer to a random option that is allowed and accepted; False when no layer has any."""
    now_K1 = np.sum([use_KJ[:, index] for use_KJ, index in zip(use_LKJ, choice, strict=True)], axis=0)[:, None]
    for layer in random.permutation(len(choice)):
        used_KJ = now_K1 - use_LKJ[layer][:, [choice[layer]]] + use_LKJ[layer]
        accepted = np.flatnonzero(allowed[layer] & accepts(now_K1, used_KJ))
        if accepted.size:
            choice[layer] = int(random.choice(accepted))
            return True
    return False


def _limited_use(problem: Problem, layer: int) -> Floats:
    """Use of every limit's resource by a layer's options, (K, J)."""
    shape = (len(problem.limits), len(problem.options[layer]))
    return np.array([problem.resources[limit.resource][layer] for limit in problem.limits]).reshape(shape)


def _worst(overdraft_KJ: Floats) -> Floats:
    """The largest over the limits; with no limit, everything fits."""
    return np.asarray(overdraft_KJ.max(axis=0, initial=-np.inf))


def _nonzero(values: Floats) -> Floats:
    return np.where(values == 0.0, 1.0, values)


def _uses(problem: Problem, choice: Choice) -> str:
    used = problem.use(choice)
    uses = [f"{limit.name} {used[limit.name]:,.12g} of {limit.capacity:,.12g} {limit.unit}" for limit in problem.limits]
    return ", ".join(uses + [f"rule {rule.name}" for rule in problem.rules if not rule.holds(choice)])
