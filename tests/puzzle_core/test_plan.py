"""The plan of a run: what changes a key, and above all what does not."""

import pytest

from puzzle_core.architecture import Architecture, Option, Variant
from puzzle_core.errors import SpecError
from puzzle_core.plan import Inputs, Plan, RoundChild, layer_ranges
from puzzle_core.resources import resources
from puzzle_core.spec import parse_spec
from tests.conftest import MIXED

SPEC = {
    "parent": {"path": "p"},
    "data": {"sequence_length": 16},
    "variants": {"kv_heads": [1], "ffn_ratios": [0.5]},
    "scenario": {"prompt_tokens": 8, "generated_tokens": 8, "batch_sizes": [1, 2], "limits": {"memory": "60%"}},
}


@pytest.fixture
def plan(parent):
    """The plan of SPEC with some parts changed, for the plain parent."""
    inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
    return lambda **parts: Plan(parse_spec(SPEC | parts, "spec"), Inputs(shape=parent.shape, **inputs))


def keys(plan):
    """Every key of a plan, by stage."""
    architecture = Architecture.parse(MIXED)
    return {
        "tokens": [plan.tokens(split).key for split in plan.splits],
        "importance": [plan.importance().key],
        "bld": [work.key for work in plan.all_bld()],
        "scores": [work.key for work in plan.all_scores()],
        "costs": [work.key for work in plan.costs().values()],
        "search": [plan.search().key],
        "gkd": [work.key for work in plan.trainings(architecture).values()],
        "evaluation": [plan.evaluate("child").key],
        "timing": [plan.timing({"child": architecture}, 1).key],
    }


LENGTHS = ("bld", "gkd", "scoring", "evaluation")
LATER = ("tokens", "importance", "bld", "scores", "search", "gkd", "evaluation")
CHANGES = {
    "nothing": ({}, set()),
    "where it runs": ({"runtime": {"workers": 7, "store": "elsewhere", "task_runner": "dask"}}, set()),
    "name": ({"name": "other"}, set()),
    "limit": ({"scenario": SPEC["scenario"] | {"limits": {"memory": "70%"}}}, {"search"}),
    "traffic": ({"scenario": SPEC["scenario"] | {"prompt_tokens": 9}}, {"costs", "search", "timing"}),
    "search": ({"search": {"solutions": 2}}, {"search"}),
    "rounds": ({"target": {"rounds": 9}}, {"costs", "search"}),
    "gkd": ({"gkd": {"kl_weight": 2}}, {"gkd"}),
    "calibration": ({"importance": {"tokens": 64}}, {"tokens", "importance", "bld", "scores", "search", "gkd"}),
    "evaluation": ({"evaluation": {"tokens": 64}}, {"tokens", "evaluation"}),
    "scoring": ({"scoring": {"dtype": "bfloat16"}}, {"scores", "search"}),
    "loss that is the default": ({"bld": {"loss": "tensor"}}, set()),
    "loss": ({"bld": {"loss": "token"}}, {"bld", "scores", "search", "gkd"}),
    "estimates": ({"scoring": {"method": "fisher"}}, {"scores", "search"}),
    "labels without estimates": ({"scoring": {"label_samples": 4}}, set()),
    "bld": ({"bld": {"epochs": 2}}, {"bld", "scores", "search", "gkd"}),
    "lengths that are the default": ({stage: {"sequence_length": 16} for stage in LENGTHS}, set()),
    "length of bld": ({"bld": {"sequence_length": 32}}, {"tokens", "bld", "scores", "search", "gkd"}),
    "length of scoring": ({"scoring": {"sequence_length": 32}}, {"tokens", "scores", "search", "evaluation"}),
    "length of gkd": ({"gkd": {"sequence_length": 32}}, {"tokens", "gkd"}),
    "length of evaluation": ({"evaluation": {"sequence_length": 32}}, {"tokens", "evaluation"}),
    "documents": ({"data": {"sequence_length": 16, "document_mask": True}}, set(LATER)),
    "a second gkd": ({"gkd": {"long": {"sequence_length": 64, "tokens": 128}}}, {"tokens", "gkd"}),
}


@pytest.mark.parametrize(("parts", "stages"), CHANGES.values(), ids=CHANGES)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(plan, parts, stages):
    before, after = keys(plan()), keys(plan(**parts))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_the_number_of_calibration_tokens_changes_calibration_and_pruned_ffns_alone(plan):
    few, many = plan(importance={"tokens": 64}), plan(importance={"tokens": 640})
    assert few.tokens("calibration") != many.tokens("calibration")
    assert all(few.tokens(split) == many.tokens(split) for split in ("bld", "gkd", "scoring", "evaluation"))
    pairs = zip(few.all_bld(), many.all_bld(), strict=True)
    assert {str(one.variant) for one, other in pairs if one.key != other.key} == {"ffn:i24"}


@pytest.mark.parametrize(
    ("of_parent", "of_spec", "dtype"),
    [("bfloat16", {}, "bfloat16"), ("float32", {}, "float32"), ("bfloat16", {"dtype": "float32"}, "float32")],
)
def test_a_child_has_its_parents_dtype_if_the_spec_names_none(plan, of_parent, of_spec, dtype):
    found = plan(target=of_spec)
    found = Plan(found.spec, found.inputs.model_copy(update={"dtype": of_parent}))
    architecture = Architecture.parse(MIXED)
    assert found.assemble(architecture).dtype == found.gkd(architecture).dtype == dtype
    targets = [work.target for work in found.costs().values()]
    targets += [found.timing({"child": architecture}, 1).target, found.spec_of_content().target]
    assert {target.dtype for target in targets} == {dtype}
    named = plan(target={"dtype": dtype})
    assert keys(found) == keys(named)
    assert resources(found) == resources(named)
    assert found.spec_of_content() == named.spec_of_content()


def test_every_stage_has_windows_of_its_length_and_no_other_ones_tokens(plan):
    found = plan(bld={"sequence_length": 32}, evaluation={"sequence_length": 8})
    lengths = {split: found.tokens(split).sequence_length for split in found.splits}
    assert lengths == {"calibration": 16, "bld": 32, "gkd": 16, "scoring": 16, "evaluation": 8}
    assert found.tokens("gkd").before == found.tokens("bld")
    assert found.tokens("evaluation").before == found.tokens("scoring")
    assert found.tokens("scoring") == plan().tokens("scoring")


def test_a_second_gkd_goes_on_from_the_child_of_the_first_one(plan):
    long = {"sequence_length": 64, "tokens": 1280, "batch_tokens": 128, "learning_rate": 1e-5}
    once, twice = plan(), plan(gkd={"long": long})
    architecture = Architecture.parse(MIXED)
    first, second = twice.trainings(architecture).values()
    assert first == once.gkd(architecture)
    assert second == twice.gkd(architecture)
    assert (second.child, second.tokens) == (first.key, twice.tokens("gkd-long").key)
    assert twice.tokens("gkd-long").before == once.tokens("gkd")
    assert (second.spec.batch_tokens, second.spec.optimizer.learning_rate) == (128, 1e-5)
    assert second.spec.optimizer.betas == first.spec.optimizer.betas
    assert second.spec.cosine_weight == first.spec.cosine_weight
    assert resources(twice).gkd_tokens == resources(once).gkd_tokens + 1280
    assert resources(twice).gkd_flops > resources(once).gkd_flops * (1 + 1280 / 524_288)  # longer windows take more


def test_every_trained_half_of_a_score_has_its_training(plan):
    trained = {work.key for work in plan().all_bld()}
    used = {key for work in plan().all_scores() for key in (work.attention, work.ffn) if key}
    assert used == trained
    assert len(trained) == 5 * len(["attn:kv1", "attn:linear", "ffn:i24", "ffn:linear"])


def test_pairs_are_scored_whole_and_subblocks_alone(plan):
    assert len(plan().scored(0)) == 4 * 4 - 1
    alone = plan(scoring={"composition": "subblocks"}).scored(0)
    assert len(alone) == 3 + 3


def test_the_source_of_states_is_in_no_key_and_micro_batches_are(plan):
    streamed, in_parts = plan(bld={"source": "streamed"}), plan(bld={"micro_batch_tokens": 2048})
    assert [work.key for work in streamed.all_bld()] == [work.key for work in plan().all_bld()]
    assert streamed.spec_of_content() == plan().spec_of_content()
    assert not {work.key for work in in_parts.all_bld()} & {work.key for work in plan().all_bld()}
    assert (resources(streamed).bld_scratch_bytes, resources(plan()).bld_scratch_bytes > 0) == (0, True)
    assert resources(streamed).bld_flops > resources(plan()).bld_flops


def test_pairs_with_a_linear_layer_or_a_no_op_are_trained_whole_and_leave_the_keys_of_halves(plan):
    coupled, halves = plan(bld={"coupled": "linear_and_no_op"}), {work.key for work in plan().all_bld()}
    whole = [work for work in coupled.all_bld() if isinstance(work.variant, Option)]
    assert {work.key for work in coupled.all_bld()} == halves | {work.key for work in whole}
    assert len(whole) == 5 * (4 * 4 - 2 * 2 - 1)  # but the pairs of real attentions and real FFNs, and nothing at all
    started = {key for work in whole for key in work.halves if key}
    assert started == halves
    scores = {str(work.block): work for work in coupled.all_scores() if work.layer == 2}
    together, apart = scores["attn:no_op+ffn:i24"], scores["attn:kv1+ffn:i24"]
    assert (together.attention, together.ffn, together.whole) == (None, None, coupled.library_key(2, together.option))
    assert apart in plan().all_scores()
    assert len(plan(bld={"coupled": "all"}).trained_whole(0)) == 4 * 4 - 2
    assert plan(bld={"coupled": "shortlist"}).all_scores() == plan().all_scores()


def test_the_second_stage_trains_every_pair_that_the_first_search_picks(plan):
    first = plan(bld={"coupled": "shortlist"}, scoring={"composition": "subblocks"})
    ranges = [{"first_layer": 0, "last_layer": 4, "linear": False, "no_op": False, "ids": ["attn:kv1", "ffn:no_op"]}]
    second = first.coupled_in(parse_spec(SPEC | {"variants": {"layers": ranges}}, "spec").variants)
    assert [str(option) for option in second.trained_whole(0)] == [
        "attn:kv4+ffn:no_op",
        "attn:kv1+ffn:i48",
        "attn:kv1+ffn:no_op",
    ]
    assert {work.key for work in second.all_bld()} & {work.key for work in first.all_bld()}
    assert all(work.whole for work in second.all_scores())


def test_spans_are_offered_where_layers_are_left_and_start_from_the_halves_of_the_first(plan):
    spec = {"kv_heads": [1], "ffn_ratios": [0.5], "spans": [2, 3], "span_blocks": ["attn:kv1+ffn:i48"]}
    found = plan(variants=spec)
    spans = [work for work in found.all_bld() if isinstance(work.variant, Option)]
    assert [(w.layer, w.last_layer) for w in spans] == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    assert spans[0].halves == (found.library_key(0, Variant.parse("attn:kv1")), None)
    assert [work.key for work in found.all_scores() if work.span == 1] == [work.key for work in plan().all_scores()]
    architecture = Architecture.parse(["attn:kv4+ffn:i48", "attn:kv1+ffn:i48 x3", "attn:kv4+ffn:i48"])
    assert found.assemble(architecture).library == ((), ((str(spans[3].variant), spans[3].key),), (), (), ())


def test_only_pruned_ffns_wait_for_contributions(plan):
    waiting = {str(work.variant) for work in plan().all_bld() if work.contributions}
    assert waiting == {"ffn:i24"}


def test_every_variant_is_measured_once_for_every_batch_size(plan):
    costs = plan().costs()
    assert costs.keys() == {("chatbot", 1), ("chatbot", 2)}
    measured = ["attn:kv1", "attn:kv4", "attn:linear", "ffn:i24", "ffn:i48", "ffn:linear"]
    assert sorted(map(str, costs["chatbot", 1].variants)) == measured


def test_a_child_names_the_library_of_its_trained_halves(plan):
    library = plan().assemble(Architecture.parse(["attn:kv1+ffn:no_op", *["attn:kv4+ffn:i48"] * 4])).library
    assert library == ((("attn:kv1", plan().bld(0, Variant.parse("attn:kv1")).key),), (), (), (), ())


def test_estimates_are_of_the_parent_alone_and_hang_on_its_gradients(plan):
    estimated = plan(scoring={"method": "fisher"})
    key = estimated.gradients().key
    assert {work.gradients for work in estimated.all_scores()} == {key}
    assert plan(scoring={"method": "fisher", "label_samples": 4}).gradients().key != key
    assert plan().gradients() is None
    child = Architecture.parse(MIXED)
    assert [w.key for w in estimated.all_scores(child)] == [w.key for w in plan().all_scores(child)]


def test_gradients_that_are_there_take_no_room(plan):
    estimated = plan(scoring={"method": "fisher"})
    fresh, rest = resources(estimated), resources(estimated, done={estimated.gradients().key})
    assert fresh.store_bytes - rest.store_bytes == 8 * 5 * 16_384 * 32 * 4


def test_what_is_done_takes_nothing_more(plan):
    done = {work.key for work in [*plan().all_bld(), *plan().all_scores()]}
    fresh, rest = resources(plan()), resources(plan(), done=done)
    assert (rest.bld_scratch_bytes, rest.score_scratch_bytes, rest.score_tokens, rest.library_bytes) == (0, 0, 0, 0)
    assert fresh.trained_tokens - rest.trained_tokens == 20 * 262_144


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"variants": {"layers": [{"first_layer": 4, "last_layer": 5}]}}, "the parent has layers 0 to 4"),
        ({"variants": {"kv_heads": [3]}}, "3 KV heads do not divide"),
        ({"data": {"sequence_length": 256}}, "data.sequence_length is 256, but the parent's context holds 128"),
        ({"bld": {"sequence_length": 256}}, "bld.sequence_length is 256, but the parent's context holds 128"),
        ({"gkd": {"long": {"sequence_length": 256, "tokens": 9}}}, "gkd.long.sequence_length is 256, but the parent's"),
        ({"scenario": SPEC["scenario"] | {"prompt_tokens": 121}}, "scenario chatbot is 129"),
        ({"bld": {"coupled": "all"}, "scoring": {"composition": "subblocks"}}, "set scoring.composition to pairs"),
        ({"variants": {"spans": [2]}, "search": {"iterations": 1}}, "leave out search.iterations or variants.spans"),
        (
            {"variants": {"spans": [2]}, "rounds": [{"limits": {"memory": "90%"}, "gkd": {"tokens": 8192}}]},
            "leave out rounds or variants.spans",
        ),
    ],
)
def test_what_the_parent_cannot_have_is_refused_before_any_work(plan, parts, message):
    with pytest.raises(SpecError, match=message):
        plan(**parts)


AUTO = {name: {"dtype": "auto"} for name in ("bld", "scoring", "gkd", "evaluation")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_hold_what_auto_is_on_the_machine(plan, dtype):
    spec, inputs = parse_spec(SPEC | AUTO, "spec"), plan().inputs
    resolved = Plan(spec, inputs.model_copy(update={"auto_dtype": dtype}))
    named = plan(**{name: {"dtype": dtype} for name in AUTO})
    assert (spec.auto_parts, resolved.spec.auto_parts) == (tuple(AUTO), ())
    assert keys(resolved) == keys(named)
    assert resolved.spec_of_content() == named.spec_of_content()


def test_the_type_of_an_evaluation_is_in_its_key_alone(plan):
    other, own = keys(plan(evaluation={"dtype": "bfloat16"})), keys(plan())
    assert {stage for stage in own if own[stage] != other[stage]} == {"evaluation"}


def test_ranges_of_layers_are_the_whole_with_the_same_keys(plan):
    whole = plan()
    parts = [whole.of_layers(layers) for layers in layer_ranges(len(whole.layers), 2)]
    assert [part.name for part in parts] == [f"{whole.spec.name}-layers-0-1", f"{whole.spec.name}-layers-2-4"]
    for works in ("all_bld", "all_scores"):
        assert [work.key for part in parts for work in getattr(part, works)()] == [
            work.key for work in getattr(whole, works)()
        ]
    assert [work.layer for work in whole.of_layers("3").all_bld()] == [3] * len(whole.trained(3))
    assert whole.of_layers(None) is whole
    assert layer_ranges(3, 8) == ["0-0", "1-1", "2-2"]


@pytest.mark.parametrize("layers", ["3-5", "5", "4-3", "-2", "1,2", "first"])
def test_layers_that_the_parent_lacks_are_refused(plan, layers):
    with pytest.raises(SpecError, match=rf"layers is '{layers}', but the parent has layers 0 to 4"):
        plan().of_layers(layers)


def test_a_later_round_starts_from_the_child_and_refers_to_the_first_parent(plan):
    rounds = {"rounds": [{"limits": {"memory": "80%"}, "gkd": {"tokens": 4096}}], "search": {"baselines": ["greedy"]}}
    first = plan(**rounds)
    assert (first.is_last, first.spec.scenario.limits.memory, first.spec.gkd.tokens) == (False, "80%", 4096)
    assert first.spec.search.baselines == ()
    child = RoundChild(key="gkd/v2/child", architecture=Architecture.parse(MIXED))
    last = Plan(parse_spec(SPEC | rounds, "spec"), first.inputs.after(child))
    assert (last.is_last, last.spec.scenario.limits.memory, last.spec.search.baselines) == (True, "60%", ("greedy",))
    assert last.spec.gkd == plan().spec.gkd
    assert list(map(str, last.inputs.shape.blocks)) == list(MIXED)
    assert {work.parent for work in (*last.all_bld(), *last.all_scores())} == {child.key}
    assert {last.evaluate("child").parent, last.gkd(child.architecture).parent} == {first.inputs.parent}
    assert last.costs() == first.costs()
    assert (first.search().first, last.search().first) == (None, first.inputs.shape)
