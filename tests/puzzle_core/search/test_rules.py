"""Rules: what they refuse, what they do to a problem, and the exact search under them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from puzzle_core.errors import CoverageError, InfeasibleError, SpecError
from puzzle_core.search.baselines import greedy, maximise, random_choice, uniform
from puzzle_core.search.best_of import solve_best
from puzzle_core.search.highs import lower_bound, minimise
from puzzle_core.search.milp import keep_useful
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem, describe
from puzzle_core.search.rules import UNCOUNTED, AllOrNone, AtMostDistinct
from tests.puzzle_core.search.conftest import in_other_units
from tests.reference.search import solve_plainly

WIDTHS = tuple(np.array([0, 1, UNCOUNTED]) for _ in range(2))
SPAN = AllOrNone("span", ((0, 1), (1, 1)))
SEEDS = range(2000, 2360)


def ruled(pair: Problem, *rules: AtMostDistinct | AllOrNone, memory: float | None = None) -> Problem:
    limits = () if memory is None else (Limit("memory", "bytes", memory, "GB"),)
    return replace(pair, rules=rules, limits=limits)


def test_distinct_by_hand(pair: Problem) -> None:
    """Of 17 GB the best is one `half` beside one `full`; one width alone makes it `half` twice or `none` once."""
    assert solve(ruled(pair, memory=17.0)).choice == (1, 0)
    assert solve(ruled(pair, AtMostDistinct("widths", WIDTHS, 1), memory=17.0)).choice in [(1, 1), (0, 2)]
    assert solve(ruled(pair, AtMostDistinct("widths", WIDTHS, 2), memory=17.0)).choice == (1, 0)
    assert solve(ruled(pair, AtMostDistinct("widths", WIDTHS, 0))).choice == (2, 2), "only `none` does not count"


def test_together_by_hand(pair: Problem) -> None:
    assert solve(ruled(pair, SPAN, memory=17.0)).choice in [(1, 1), (0, 2)], "one `half` is not to be had"
    free = replace(pair, score=(np.array([0.0, 0.5, 5.0]), np.array([9.0, 0.0, 3.0])))
    assert solve(ruled(free, SPAN)).choice == (1, 1)
    assert solve(ruled(free)).choice == (0, 1), "planted fault: without the rule the second half is free"


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_brute_force_and_a_second_formulation(seed: int, ruled_problem: Callable, brute_force: Callable) -> None:
    problem = ruled_problem(seed, layers=4, options=5) if seed % 2 else ruled_problem(seed)
    avoid = [(problem.parent, len(problem.options) // 2)] if seed % 5 == 0 else []
    best = brute_force(problem, avoid)
    assert solve_plainly(problem, avoid) == (best if best is None else pytest.approx(best, rel=1e-6, abs=1e-9))
    if best is None:
        with pytest.raises(InfeasibleError):
            solve(problem, avoid=avoid)
    else:
        solution = solve(problem, avoid=avoid)
        assert solution.optimal
        assert solution.objective == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert lower_bound(problem, problem.score) <= best + 1e-9


def test_the_random_problems_can_tell_right_from_wrong(ruled_problem: Callable, brute_force: Callable) -> None:
    """Planted fault: a search without the rules would not equal brute force."""
    problems = [ruled_problem(seed, layers=4, options=5) for seed in SEEDS if seed % 2]
    best = [brute_force(problem) for problem in problems]
    free = [brute_force(replace(problem, rules=())) for problem in problems]
    assert sum(value is None for value in best) >= 20
    assert sum(value != other for value, other in zip(best, free, strict=True)) >= 40


@pytest.mark.parametrize("seed", range(2400, 2440, 2))
def test_units_do_not_matter(seed: int, ruled_problem: Callable, brute_force: Callable) -> None:
    problem = ruled_problem(seed, layers=5, limits=2)
    problem = problem.with_limits(replace(limit, capacity=limit.capacity + 1.0) for limit in problem.limits)
    if brute_force(problem) is None:
        return
    expected = solve(problem).choice
    for other in in_other_units(problem):
        assert solve(other).choice == expected


def test_an_option_is_not_beaten_by_one_of_another_group(pair: Problem) -> None:
    """`half` is worse than `full` in everything, and what a second layer without `full` has in common with it."""
    rule = AtMostDistinct("widths", WIDTHS, 1)
    assert [rows.tolist() for rows in keep_useful(pair, pair.score) or []] == [[0], [0]]
    assert [rows.tolist() for rows in keep_useful(ruled(pair, rule), pair.score) or []] == [[0, 1, 2], [0, 1, 2]]
    uncounted = AtMostDistinct("widths", tuple(np.array([UNCOUNTED, 1, 2]) for _ in range(2)), 1)
    assert [rows.tolist() for rows in keep_useful(ruled(pair, uncounted), pair.score) or []] == [[0], [0]]


def test_members_are_not_beaten_and_go_together(pair: Problem) -> None:
    assert [rows.tolist() for rows in keep_useful(ruled(pair, SPAN), pair.score) or []] == [[0, 1], [0, 1]]
    smallest = AllOrNone("span", ((0, 0), (1, 1)))
    moved = ruled(replace(pair, parent=(1, 0)), smallest, memory=9.0)
    assert [rows.tolist() for rows in keep_useful(moved, pair.score) or []] == [[1, 2], [2]], "10 + 2 is above 9"


def test_restrict_drops_what_is_tied_to_what_goes(pair: Problem) -> None:
    problem = ruled(pair, SPAN, AtMostDistinct("widths", WIDTHS, 1))
    kept = problem.restrict(lambda layer, option: option != "none")
    assert kept.options == (("full", "half"), ("full", "half"))
    assert [rule.name for rule in kept.rules] == ["span", "widths"]
    broken = problem.restrict(lambda layer, option: (layer, option) != (0, "half"))
    assert broken.options == (("full", "none"), ("full", "none"))
    assert [rule.name for rule in broken.rules] == ["widths"]
    assert broken.rules[0].count((1, 1)) == 0


def test_restricted_problems_equal_brute_force(ruled_problem: Callable, brute_force: Callable) -> None:
    for seed in range(2500, 2530):
        problem = ruled_problem(seed, layers=4).restrict(lambda layer, option: option != "v1")
        best = brute_force(problem)
        if best is not None:
            assert solve(problem).objective == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_feasible_and_describe_check_rules(pair: Problem) -> None:
    problem = ruled(pair, SPAN, AtMostDistinct("widths", WIDTHS, 1), memory=19.0)
    assert problem.feasible((1, 1))
    assert problem.broken((1, 0)) == ["span", "widths"]
    assert problem.broken((0, 0)) == ["memory"]
    with pytest.raises(RuntimeError, match="outside span, widths"):
        describe(problem, (1, 0), method="by hand", seconds=0.0)


@pytest.mark.parametrize(
    ("rule", "error", "text"),
    [
        (AtMostDistinct("w", WIDTHS[:1], 1), CoverageError, "covers 1 layers of 2"),
        (
            AtMostDistinct("w", (WIDTHS[0], np.array([0, 1])), 1),
            CoverageError,
            r"shape \(2,\) for the 3 options of layer 1",
        ),
        (AtMostDistinct("w", (WIDTHS[0], np.array([0, 1, -2])), 1), SpecError, "layer 1 the group -2"),
        (AtMostDistinct("w", WIDTHS, -1), SpecError, "allows -1"),
        (AllOrNone("t", ((0, 1),)), SpecError, "two layers or more"),
        (AllOrNone("t", ((0, 1), (0, 2))), SpecError, "each of them once"),
        (AllOrNone("t", ((0, 1), (2, 1))), SpecError, "option 1 of layer 2, which is not there"),
        (AllOrNone("t", ((0, 1), (1, 3))), SpecError, "option 3 of layer 1, which is not there"),
        (AllOrNone("t", ((0, 1), (1, 0))), SpecError, "'full' of layer 1, the parent's own"),
    ],
)
def test_broken_rules_are_refused(pair: Problem, rule: AtMostDistinct | AllOrNone, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        ruled(pair, rule)


def test_names_and_members_are_not_repeated(pair: Problem) -> None:
    with pytest.raises(SpecError, match="called 'memory'"):
        ruled(pair, AtMostDistinct("memory", WIDTHS, 1), memory=9.0)
    with pytest.raises(SpecError, match="'span' and 'other' both tie 'half' of layer 1"):
        ruled(pair, SPAN, AllOrNone("other", ((0, 2), (1, 1))))


def test_baselines_honour_rules_or_say_so(ruled_problem: Callable) -> None:
    found = dict.fromkeys(("greedy", "uniform", "maximise", "random"), 0)
    searches = {
        "greedy": greedy,
        "uniform": uniform,
        "maximise": lambda problem: maximise(problem, "bytes"),
        "random": lambda problem: random_choice(problem, 0),
    }
    for seed in range(2600, 2660):
        problem = ruled_problem(seed, layers=4, limits=1)
        for name, search in searches.items():
            try:
                other = search(problem)
            except InfeasibleError:
                continue
            found[name] += 1
            assert problem.feasible(other.choice)
            assert solve(problem).objective <= other.objective + 1e-12
    assert min(found.values()) >= 5, found


def test_greedy_says_when_rules_leave_nothing(pair: Problem) -> None:
    apart = AtMostDistinct("widths", (np.array([0, 0, 0]), np.array([1, 1, 1])), 1)
    with pytest.raises(InfeasibleError, match=r"left layer 0 no option that the rules allow"):
        greedy(ruled(pair, apart))
    with pytest.raises(InfeasibleError, match="random"):
        random_choice(ruled(pair, apart), 0)


def test_a_rule_may_be_all_that_is_in_the_way(pair: Problem) -> None:
    apart = AtMostDistinct("widths", (np.array([0, 0, 0]), np.array([1, 1, 1])), 1)
    with pytest.raises(InfeasibleError) as caught:
        solve(ruled(pair, apart, memory=5.0))
    assert [conflict.limit.name for conflict in caught.value.conflicts] == ["widths"]
    assert "widths: asked at most 1 different; the least within reach is 2 different" in str(caught.value)


def test_the_least_number_of_groups_under_a_limit(pair: Problem) -> None:
    """7 GB take `none` beside `half`; with groups for both, that is two widths, and 3 GB do with one."""
    widths = AtMostDistinct("widths", tuple(np.array([0, 1, 2]) for _ in range(2)), 1)
    problem = ruled(pair, widths, memory=4.0)
    assert solve(problem).choice == (2, 2)
    latency = Limit("latency", "ms", 13.0, "ms")
    tight = problem.with_limits([Limit("memory", "bytes", 9.0, "GB"), latency])
    with pytest.raises(InfeasibleError) as caught:
        solve(tight)
    by_name = {conflict.limit.name: conflict for conflict in caught.value.conflicts}
    assert set(by_name) == {"widths", "memory", "latency"}
    assert (by_name["widths"].least, by_name["widths"].least_alone) == (2.0, 1.0)
    assert (by_name["memory"].least, by_name["memory"].least_alone) == (12.0, 3.0)
    assert (by_name["latency"].least, by_name["latency"].least_alone) == (18.0, 6.0)


def test_one_width_over_many_layers_is_as_good_as_trying_each() -> None:
    """40 layers of 9 widths x 4 heads, at most 2 widths: against the best of the 36 pairs, each solved without rule."""
    random = np.random.default_rng(5)
    width, heads = (index.ravel() for index in np.meshgrid(range(9), range(4), indexing="ij"))
    score = tuple(random.random() * (width + heads) * random.uniform(0.5, 1.5, 36) for _ in range(40))
    column = tuple((20.0 - 2 * width - heads) * random.uniform(0.9, 1.1, 36) for _ in range(40))
    ids = tuple(f"{w} {h}" for w, h in zip(width, heads, strict=True))
    problem = Problem((ids,) * 40, score, (0,) * 40, {"ms": column}, (Limit("time", "ms", 450.0, "ms"),))
    groups = (np.asarray(width),) * 40
    solution = solve(replace(problem, rules=(AtMostDistinct("widths", groups, 2),)))

    def only(a: int, b: int) -> Problem:
        keep = np.flatnonzero((width == a) | (width == b))
        return Problem(
            (tuple(ids[index] for index in keep),) * 40,
            tuple(values[keep] for values in score),
            (0,) * 40,
            {"ms": tuple(values[keep] for values in column)},
            problem.limits,
        )

    pairs = {(a, b): only(a, b) for a in range(9) for b in range(a)}
    assert solution.objective == pytest.approx(solve_best(pairs).solution.objective, rel=2e-6)
    assert solution.objective > solve(problem).objective, "the rule binds"


def test_minimise_takes_other_costs_under_rules(pair: Problem) -> None:
    found = minimise(ruled(pair, SPAN), pair.resources["bytes"])
    assert found is not None
    assert found.choice == (2, 2)
