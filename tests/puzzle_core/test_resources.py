"""Operations by formula against those that torch counts while the real thing runs."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puzzle_core import evaluation, fisher, resources, scoring
from puzzle_core.architecture import Architecture, Option, Variant
from puzzle_core.distill import bld, gkd
from puzzle_core.model.activations import Activations, layer_input_name
from puzzle_core.plan import Inputs, Plan
from puzzle_core.sizes import variant_size
from puzzle_core.spec import parse_spec
from tests.conftest import CPU, MIXED

CLOSE = 0.03  # torch's reference attention computes nothing again: going both ways is 3 times its forward, and not 3.5


class Untracked(contextlib.nullcontext):
    """Operations by module are not asked for, and torch cannot tell them where autograd.grad ends at a leaf."""

    parents = frozenset({"Global"})


@pytest.fixture
def plan(parent):
    content = {
        "parent": {"path": "p"},
        "data": {"sequence_length": 16},
        "variants": {"kv_heads": [1], "ffn_ratios": [0.5]},
        "bld": {"tokens": 96, "batch_tokens": 48, "epochs": 2},
        "gkd": {"tokens": 96, "batch_tokens": 48, "held_back_checks": 2},
        "scoring": {"tokens": 96},
        "scenario": {"prompt_tokens": 8, "generated_tokens": 8, "limits": {"memory": "60%"}},
    }
    inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
    return Plan(parse_spec(content, "test"), Inputs(shape=parent.shape, **inputs))


@pytest.fixture
def counted():
    """Count the operations of an act."""

    def count(act):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Untracked()
        with (
            counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            act()
        return counter.get_total_flops()

    return count


@pytest.mark.parametrize("variant", ["attn:kv1", "attn:linear", "ffn:i24", "ffn:linear"])
def test_bld(variant, plan, counted, activations, contributions_of, tmp_path):
    work, contributions = plan.bld(2, Variant.parse(variant)), contributions_of("llama")
    counts = counted(lambda: bld.train_variant(work, activations, contributions, tmp_path))
    counts -= counted(lambda: bld.initial_state(activations, work, contributions))
    assert 192 * resources.bld_flops(plan, work) == pytest.approx(counts, rel=CLOSE)


def test_streamed_bld_has_passes_of_the_parent_up_to_each_groups_last_layer(plan, counted, activations):
    streamed = plan.spec.bld.model_copy(update={"source": "streamed"})
    runtime = plan.spec.runtime.model_copy(update={"bld_side_by_side": 8})
    plan = Plan(plan.spec.model_copy(update={"bld": streamed, "runtime": runtime}), plan.inputs)
    groups = resources.streamed_groups(plan, 0)  # four variants a layer
    assert groups == [range(2), range(2, 4), range(4, 5)]
    names = {layer_input_name(layer) for layer in (2, 4, 5)}
    counts = sum(counted(lambda name=name: activations.compute(range(6), [name])) for name in names)
    passes = 2 + 2 / 6  # two epochs, and twice the held-back one of six windows
    expected = 192 * resources.stream_flops(plan, groups, plan.all_bld())
    assert expected == pytest.approx(passes * counts, rel=CLOSE)
    assert resources.resources(plan).bld_scratch_bytes == 0


def test_groups_of_a_streamed_bld_fill_half_of_the_devices_memory(plan):
    a_layer = sum(16 * variant_size(plan.inputs.shape, variant).parameters for variant in plan.trained(0))
    for layers, expected in ((0, 5), (1, 5), (2, 3), (4.9, 2), (5, 1)):
        assert len(resources.streamed_groups(plan, 2 * layers * a_layer)) == expected


@pytest.mark.parametrize("block", ["attn:kv4+ffn:no_op", "attn:no_op+ffn:i48", "attn:no_op+ffn:no_op"])
@pytest.mark.parametrize("layer", [0, 3])
def test_scores(block, layer, plan, counted, activations):
    activations.capture_log_probabilities()
    work = plan.score(layer, Option.parse(block))
    counts = counted(lambda: scoring.score_block(work, activations, {}))
    assert 96 * resources.score_flops(plan, work) == pytest.approx(counts, rel=CLOSE)


def test_estimates(plan, counted, activations, tmp_path):
    scoring_spec = plan.spec.scoring.model_copy(update={"method": "fisher", "label_samples": 3})
    plan = Plan(plan.spec.model_copy(update={"scoring": scoring_spec}), plan.inputs)
    counts = counted(lambda: fisher.measure_gradients(plan.gradients(), activations, tmp_path))
    assert 96 * resources.gradient_flops(plan, 3) == pytest.approx(counts, rel=0.05)  # less here, for CLOSE's reason
    work = plan.score(3, Option.parse("attn:no_op+ffn:i48"))
    counts = counted(lambda: fisher.estimate_score(work, activations, {}, tmp_path))
    assert 96 * resources.score_flops(plan, work) == pytest.approx(counts, rel=CLOSE)


def test_gkd(plan, counted, parent, assemble, tokens_dir, tmp_path):
    architecture = Architecture.parse(MIXED)
    work, child_dir = plan.gkd(architecture), assemble("llama", MIXED)  # assembled before anything is counted
    counts = counted(lambda: gkd.distil(work, parent, child_dir, tokens_dir, tmp_path))
    expected = 96 * resources.gkd_flops(plan, architecture, recompute=False)
    assert expected == pytest.approx(counts, rel=CLOSE)


def test_scratch_of_evaluations(plan, parent, ids_NT, tmp_path, monkeypatch):
    activations, sizes, drop = Activations(tmp_path, parent, ids_NT, torch.float32, CPU), [], evaluation.drop_layer

    def measure(*_):
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))

    monkeypatch.setattr(evaluation, "drop_layer", lambda *given: (measure(), drop(*given)))
    evaluation.capture_parent(activations)
    measure()
    spec = plan.spec.evaluation.model_copy(update={"tokens": ids_NT.numel()})
    found = resources.resources(Plan(plan.spec.model_copy(update={"evaluation": spec}), plan.inputs))
    state = ids_NT.numel() * parent.shape.hidden * 4
    assert sizes == [2 * state] * parent.shape.layers + [found.evaluation_scratch_bytes - state]
