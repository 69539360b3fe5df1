"""The reduced space of coupled BLD: what the answer has stays, the rest by how often a search picks it."""

from puzzle_core.architecture import Architecture
from puzzle_core.search.picked import picked_variants
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import find_architecture
from puzzle_core.spec import VariantsSpec
from tests.puzzle_core.search.test_problem_builder import OWN, costs, request, scores

SPACE = VariantsSpec(kv_heads=(2, 1), ffn_ratios=(0.75, 0.5, 0.25), spans=(2,))


def picked(parent, best, *frontier, runner_ups=()):
    """The variants of the plain parent's layer 0 that stay, beside the parent's own."""
    record = find_architecture(ProblemBuilder(request({"block_time": "75%"}), scores(), costs()))
    found = [
        record.best.model_copy(update={"architecture": Architecture.parse([one, *[str(OWN)] * 4])})
        for one in (best, *frontier)
    ]
    others = tuple(record.runner_ups[0].model_copy(update={"layer": 0, "others": texts}) for texts in runner_ups)
    update = {"solutions": (found[0],), "frontier": tuple(found[1:]), "runner_ups": others}
    space = picked_variants(record.model_copy(update=update), SPACE, parent.shape)
    assert space.spans == SPACE.spans
    attentions, ffns = space.of_layer(0, parent.shape)
    assert (attentions[0], ffns[0]) == parent.shape.parent_block(0).subblocks
    return {str(variant) for variant in (*attentions[1:], *ffns[1:])}


def test_what_the_answer_has_stays_and_the_most_frequent_fill_what_is_left(parent):
    often = ["attn:no_op+ffn:i24"] * 3
    assert picked(parent, "attn:kv1+ffn:i12", *often, "attn:linear+ffn:i36", "attn:kv2+ffn:no_op") == {
        *("attn:kv1", "attn:no_op", "attn:kv2"),
        *("ffn:i12", "ffn:i24"),
    }


def test_runners_up_fill_what_is_left_and_those_of_an_earlier_layer_do_not(parent):
    others = [("attn:kv2+ffn:i24", "covered by layer 0: attn:kv1+ffn:i12 x2")]
    assert picked(parent, "attn:kv4+ffn:i36", runner_ups=others) == {"attn:kv2", "ffn:i36", "ffn:i24"}


def test_a_span_counts_as_its_block_in_the_first_of_its_layers(parent):
    assert picked(parent, "attn:kv2+ffn:i12 x2") == {"attn:kv2", "ffn:i12"}
