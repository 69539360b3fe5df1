"""Lazily exact scores: which blocks a search needs exact scores of, and what it takes for the rest (METHOD section 4).

All blocks have estimates. The search is solved with exact scores where they are known, and elsewhere with estimates
that are calibrated by the exact scores seen so far and taken optimistically. What an answer uses is scored exactly, and
the search is solved again. An answer that uses exact scores alone is the best one, unless a block that is not scored is
better than its optimistic estimate.
"""

from collections.abc import Container, Sequence
from statistics import median

from puzzle_core.architecture import Architecture, Option
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import find_architecture, find_solutions
from puzzle_core.search.search_record import FoundArchitecture
from puzzle_core.search.tables import CostTable, ScoreTable
from puzzle_core.spec import SearchRequest
from puzzle_core.work import ScoreRecord

OPTIMISM = 0.8
"""What a calibrated estimate is taken times."""
Place = tuple[int, Option]
"""A layer, and an option that is scored there."""


def lazy_scores(estimates: Sequence[ScoreRecord], exact: Sequence[ScoreRecord]) -> list[ScoreRecord]:
    """One score per estimate: the exact one, or the estimate times OPTIMISM and the median ratio of exact scores to
    their estimates."""
    known = {(score.layer, score.option): score for score in exact}
    ratios = [
        known[score.layer, score.option].kl_nats_per_token / score.kl_nats_per_token
        for score in estimates
        if (score.layer, score.option) in known and score.kl_nats_per_token > 0
    ]
    factor = OPTIMISM * (median(ratios) if ratios else 1.0)
    return [
        known.get((score.layer, score.option))
        or score.model_copy(update={"kl_nats_per_token": factor * score.kl_nats_per_token})
        for score in estimates
    ]


def not_exact(
    found: Sequence[FoundArchitecture], composition: str, parent: Architecture, exact: Container[Place]
) -> list[Place]:
    """The blocks of some architectures that have no exact score, in order.

    Args:
        composition: `pairs`, or `subblocks`, where each subblock is scored beside the parent's other one.
        parent: the parent's own blocks, whose scores are 0.
        exact: the blocks with exact scores.
    """
    used = {place for one in found for place in _used(one.architecture, composition, parent)}
    return sorted((place for place in used if place not in exact), key=lambda place: (place[0], str(place[1])))


def next_to_score(
    request: SearchRequest, scores: ScoreTable, costs: CostTable, composition: str, exact: Container[Place]
) -> list[Place]:
    """The blocks that a search should score exactly next; none where its solutions and its frontier are exact.

    Args:
        scores: of `lazy_scores`.
        exact: the blocks with exact scores.

    Raises:
        InfeasibleError: no architecture meets the limits.
    """
    found = find_solutions(ProblemBuilder(request, scores, costs))
    missing = not_exact(found.solutions, composition, scores.parent, exact)
    if missing:
        return missing
    search = request.search.model_copy(update={"baselines": (), "explain": False})
    found = find_architecture(ProblemBuilder(request.model_copy(update={"search": search}), scores, costs))
    return not_exact(found.frontier, composition, scores.parent, exact)


def _used(architecture: Architecture, composition: str, parent: Architecture) -> set[Place]:
    """The blocks whose scores an architecture's score is the sum of."""
    places, own = set[Place](), parent.layers
    for layer, option in architecture.options.items():
        alone = composition == "subblocks" and option.span == 1
        used = [Option(own[layer].with_variant(v)) for v in option.block.subblocks] if alone else [option]
        places |= {(layer, one) for one in used if one != Option(own[layer])}
    return places
