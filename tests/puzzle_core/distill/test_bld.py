"""Blockwise local distillation: zero stays zero, reduced variants learn, and nothing outside the variant moves."""

import logging

import pytest
import torch

from puzzle_core.architecture import Variant
from puzzle_core.distill import bld
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import NonFiniteError
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.activations import Activations
from puzzle_core.model.remote.modeling_puzzle import family_class
from puzzle_core.model.surgery import load_weights
from puzzle_core.spec import BldSpec
from puzzle_core.work import BldWork
from tests.conftest import CPU

LAYER = 1
VARIANTS = ["attn:kv1", "attn:linear", "ffn:i12", "ffn:linear"]


@pytest.fixture
def distil(activations, contributions_of, tmp_path):
    """Train a variant of the plain parent's layer 1; half of the windows in a batch if not said."""

    def run(variant, spec=None, activations=activations, seed=0, name="llama", **options):
        spec = BldSpec(**({"batch_tokens": 48, "epochs": 10} | (spec or {})))
        work = BldWork(
            parent="p", layer=LAYER, variant=Variant.parse(variant), tokens="t", contributions="c", seed=seed, spec=spec
        )
        return bld.train_variant(work, activations, contributions_of(name), tmp_path, **options)

    return run


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo3", "phi3"])
@pytest.mark.parametrize("variant", ["attn:kv4", "ffn:i48"])
def test_the_parents_own_variant_starts_and_stays_at_zero(name, variant, distil, activations_of, tmp_path):
    activations, settings = activations_of(name), {"batch_tokens": 96, "optimizer": {"weight_decay": 0}}
    record = distil(variant, settings, activations, name=name)
    assert record.curve == (0.0,) * 10
    own = activations.parent.layer_tensors(LAYER)
    assert all(torch.equal(tensor, own[name]) for name, tensor in load_weights(tmp_path).items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reduced_variant_learns(variant, distil, initial_state, tmp_path):
    record = distil(variant, {"optimizer": {"learning_rate": 0.01}})
    assert 0 < record.curve[-1] < 0.8 * record.curve[0]
    assert record.tokens == 20 * 48
    assert load_weights(tmp_path).keys() == initial_state("llama", LAYER, variant).keys()


@pytest.mark.parametrize("variant", ["attn:kv1", "ffn:i12"])
def test_the_initial_loss_is_that_of_the_initial_weights_on_the_held_back_window(
    variant, distil, activations, initial_state
):
    block = activations.parent.block(LAYER, torch.float32, CPU)
    swapped = bld.variant_block(
        activations.parent, LAYER, Variant.parse(variant), initial_state("llama", LAYER, variant), torch.float32, CPU
    )
    entered, left = activations.layer_input(LAYER)[-1:], activations.layer_input(LAYER + 1)[-1:]
    context = activations.contexts()[LAYER]
    post_attention = (swapped if variant.startswith("attn") else block).attend(entered, **context)
    output = (block if variant.startswith("attn") else swapped).feed(post_attention)
    expected = (output - left).square().mean() / left.square().mean()
    assert distil(variant, {"batch_tokens": 96}).initial_loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_that_of_the_specification(distil, activations, initial_state):
    swapped = bld.variant_block(
        activations.parent,
        LAYER,
        Variant.parse("ffn:i12"),
        initial_state("llama", LAYER, "ffn:i12"),
        torch.float32,
        CPU,
    )
    entered, left = activations.post_attention(LAYER)[-1:], activations.layer_input(LAYER + 1)[-1:]
    by_token = (swapped.feed(entered) - left).square().sum(-1) / left.square().sum(-1)
    record = distil("ffn:i12", {"loss": "token", "optimizer": {"learning_rate": 0.01}})
    assert record.initial_loss == pytest.approx(by_token.mean().item(), rel=1e-5)
    assert record.initial_loss != pytest.approx(distil("ffn:i12").initial_loss, rel=1e-3)
    assert 0 < record.curve[-1] < 0.8 * record.curve[0]


@pytest.mark.parametrize("variant", ["attn:kv2", "ffn:i24"])
def test_resumed_is_bitwise_the_uninterrupted(variant, distil, tmp_path):
    def stop(progress):
        if progress.step == 7:
            raise KeyboardInterrupt

    curve, weights = distil(variant).curve, load_weights(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        distil(variant, checkpoints=checkpoints, report=stop)
    steps = []
    assert distil(variant, checkpoints=checkpoints, report=steps.append).curve == curve
    assert steps[0].step == 7
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_weights(tmp_path).items())


def test_the_order_of_windows_is_that_of_the_seed(distil):
    zero, again, one = (distil("ffn:i24", seed=seed) for seed in (0, 0, 1))
    assert zero.curve == again.curve
    assert zero.initial_loss == one.initial_loss
    assert zero.curve[0] != one.curve[0]


def test_no_gradient_leaves_the_variant(distil, parent):
    distil("attn:kv1")
    assert all(p.grad is None and not p.requires_grad for p in parent.block(LAYER, torch.float32, CPU).parameters())


def test_an_ffn_variant_never_runs_an_attention(distil, monkeypatch):
    distil("ffn:i12")  # whatever is opened or captured once is there from now on
    monkeypatch.setattr(
        family_class(FAMILIES["llama"].description(), "Attention"),
        "forward",
        lambda *_, **__: pytest.fail("attention ran"),
    )
    distil("ffn:i12")


def test_a_diverged_training_names_layer_and_variant(distil):
    with pytest.raises(NonFiniteError, match="BLD of layer 1 ffn:i24 diverged"):
        distil("ffn:i24", {"optimizer": {"learning_rate": 30.0}})


def test_bfloat16_trains_float32_weights(distil, parent, ids_NT, tmp_path):
    states = Activations(tmp_path / "states", parent, ids_NT, torch.bfloat16, CPU)
    states.capture_embedding()
    for layer in range(LAYER + 1):
        states.capture_layer(layer)
    for variant in VARIANTS:
        record = distil(variant, {"dtype": "bfloat16", "optimizer": {"learning_rate": 0.01}}, activations=states)
        assert record.curve[-1] < record.curve[0]
        assert {tensor.dtype for tensor in load_weights(tmp_path).values()} == {torch.float32}


def test_a_training_that_does_not_help_leaves_the_initial_weights_and_says_so(distil, initial_state, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "puzzle"):
        record = distil("ffn:i12", {"optimizer": {"learning_rate": 0.01}})  # learns five windows by heart
    assert record.curve[-1] < record.curve[0]
    assert record.final_loss == record.initial_loss
    assert "BLD of layer 1 ffn:i12 did not help: its loss on held-back windows went from" in caplog.text
    weights = load_weights(tmp_path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in initial_state("llama", LAYER, "ffn:i12").items())


def test_a_training_that_helps_is_kept(distil, initial_state, tmp_path):
    record = distil("attn:linear", {"epochs": 2, "optimizer": {"learning_rate": 0.001}})
    assert record.final_loss < record.initial_loss
    initial = initial_state("llama", LAYER, "attn:linear")
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in load_weights(tmp_path).items())
