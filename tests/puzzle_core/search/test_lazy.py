"""Lazily exact scores: what is asked for, how the rest is taken, and that the answer is the one of all exact scores."""

import random

import pytest

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.errors import CoverageError
from puzzle_core.search.lazy import OPTIMISM, lazy_scores, next_to_score, not_exact
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import score_table
from puzzle_core.search.run_search import find_architecture
from puzzle_core.search.tables import Option, ScoreTable
from puzzle_core.spec import VariantsSpec
from puzzle_core.work import ScoreRecord
from tests.puzzle_core.search.test_problem_builder import HALVES, LAYERS, LOST, OWN, PARENT, costs, request

BLOCKS = [BlockVariant.parse(f"{a}+{f}") for a in HALVES if a[0] == "a" for f in HALVES if f[0] == "f"]


def record(layer, block, kl, method="exact"):
    option = Option.parse(block) if isinstance(block, str) else block
    return ScoreRecord(layer=layer, block=option.block, kl_nats_per_token=kl, tokens=1, method=method)


def table(records):
    by_place = {(score.layer, score.option): score.kl_nats_per_token for score in records}
    layers = ({Option(b): by_place.get((layer, Option(b)), 0.0) for b in BLOCKS} for layer in range(LAYERS))
    return ScoreTable(PARENT, tuple(layers))


def exact_scores(seed):
    """Scores of a small library with some noise, so that no two blocks tie."""
    noise = random.Random(seed)
    return {
        (layer, Option(block)): (1 + layer) * sum(LOST[str(half)] for half in block.subblocks) * noise.uniform(0.8, 1.2)
        for layer in range(LAYERS)
        for block in BLOCKS
        if block != OWN
    }


def estimates_of(exact, seed, low, high):
    noise = random.Random(seed)
    return [record(layer, block, kl * noise.uniform(low, high), "fisher") for (layer, block), kl in exact.items()]


def run_lazily(estimates, exact, asked_for):
    """The rounds of a search: every score that is asked for, in order, and the last scores."""
    known = {}
    while wanted := next_to_score(
        asked_for, table(lazy_scores(estimates, list(known.values()))), costs(), "pairs", known
    ):
        assert not known.keys() & set(wanted)
        known |= {place: record(*place, exact[place]) for place in wanted}
    return known, lazy_scores(estimates, list(known.values()))


def test_exact_scores_win_and_the_rest_is_calibrated_by_the_median_and_optimistic():
    block = "attn:no_op+ffn:i512"
    estimates = [record(layer, block, 1.0 + layer, "fisher") for layer in range(4)]
    exact = [record(0, block, 2.0), record(1, block, 8.0), record(3, block, 4.4)]
    found = lazy_scores(estimates, exact)
    assert found[:2] == exact[:2]
    assert found[3] == exact[2]
    assert found[2].kl_nats_per_token == pytest.approx(OPTIMISM * 2.0 * 3.0)
    assert found[2].method == "fisher"
    assert [score.kl_nats_per_token for score in lazy_scores(estimates, [])] == pytest.approx([0.8, 1.6, 2.4, 3.2])


def test_what_an_architecture_uses_is_its_blocks_or_their_subblocks_alone():
    search = request({"parameters": "60%"})
    found = find_architecture(ProblemBuilder(search, table([]), costs())).best
    mixed = Architecture.parse(["attn:kv2+ffn:i96", *[str(OWN)] * 2, "attn:kv4+ffn:no_op"])
    found = found.model_copy(update={"architecture": mixed})
    pairs = not_exact([found], "pairs", PARENT, ())
    assert [(layer, str(block)) for layer, block in pairs] == [(0, "attn:kv2+ffn:i96"), (3, "attn:kv4+ffn:no_op")]
    alone = not_exact([found], "subblocks", PARENT, {pairs[1]})
    assert [(layer, str(block)) for layer, block in alone] == [(0, "attn:kv2+ffn:i512"), (0, "attn:kv4+ffn:i96")]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("limit", ["80%", "55%"])
def test_the_answer_is_that_of_all_exact_scores_where_estimates_are_within_the_interval(seed, limit):
    """Estimates that are at most a tenth off: times 0.8 and the median ratio they lie below every exact score."""
    exact, asked_for = exact_scores(seed), request({"parameters": limit}, search={"frontier_points": 2})
    known, scores = run_lazily(estimates_of(exact, seed, 0.91, 1.09), exact, asked_for)
    lazily = find_architecture(ProblemBuilder(asked_for, table(scores), costs()))
    best = find_architecture(
        ProblemBuilder(asked_for, table([record(*place, kl) for place, kl in exact.items()]), costs())
    )
    assert lazily.best.architecture == best.best.architecture
    assert lazily.best.score == pytest.approx(best.best.score)
    assert [p.score for p in lazily.frontier] == pytest.approx([p.score for p in best.frontier])
    assert not not_exact(lazily.solutions, "pairs", PARENT, known)
    assert 0 < len(known) < len(exact)


def test_estimates_that_are_far_off_still_end_in_an_answer_of_exact_scores():
    exact, asked_for = exact_scores(0), request({"parameters": "55%"})
    known, scores = run_lazily(estimates_of(exact, 5, 0.3, 3.0), exact, asked_for)
    lazily = find_architecture(ProblemBuilder(asked_for, table(scores), costs())).best
    assert lazily.score == pytest.approx(sum(exact.get(place, 0.0) for place in lazily.architecture.options.items()))
    assert known


def test_a_table_with_estimates_has_their_kl_and_no_increase_of_the_loss(parent):
    variants = VariantsSpec(kv_heads=(), ffn_ratios=(0.5,), linear=False, no_op=False)
    estimates = [record(layer, "attn:kv4+ffn:i24", 0.1, "fisher") for layer in range(5)]
    assert score_table(estimates, "pairs", "kl", variants, parent.shape).lm_loss is None
    with pytest.raises(CoverageError, match=r"layer 0 .* has no score for the objective lm_loss: score it exactly"):
        score_table(estimates, "pairs", "lm_loss", variants, parent.shape)
