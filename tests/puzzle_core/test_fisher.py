"""Estimated scores: gradients are autograd's, their mean is the second-order KL, and they rank blocks as exact ones."""

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from puzzle_core import fisher, scoring
from puzzle_core.architecture import BlockVariant
from puzzle_core.errors import NonFiniteError, StorageError
from puzzle_core.model import predictions
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec, VariantsSpec
from puzzle_core.work import GradientsWork, ScoreWork
from tests.conftest import CPU
from tests.pico import edit_tensors
from tests.reference.fisher import gradients as reference_gradients
from tests.reference.fisher import second_order_kl

LAST = 4


def gradients_work(samples=2):
    return GradientsWork(parent="p", tokens="t", dtype="float32", samples=samples, seed=7)


@pytest.fixture
def measured(activations, tmp_path):
    """The gradients of the plain parent: their directory, for a number of label samples."""

    def measure(samples=2, name="gradients", activations=activations):
        (tmp_path / name).mkdir()
        fisher.measure_gradients(gradients_work(samples), activations, tmp_path / name)
        return tmp_path / name

    return measure


@pytest.fixture
def model_of(checkpoint_of):
    """Transformers' own, with an attention that can be differentiated twice."""
    return lambda name: AutoModelForCausalLM.from_pretrained(
        checkpoint_of(name), dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture
def model(model_of):
    """That of the plain parent."""
    return model_of("llama")


def work(layer, block):
    return ScoreWork(
        parent="p", layer=layer, block=BlockVariant.parse(block), attention=None, ffn=None, tokens="t", dtype="float32",
        gradients="g",
    )  # fmt: skip


def exact_score(layer, block, activations, weights):
    return scoring.score_block(work(layer, block).model_copy(update={"gradients": None}), activations, weights)


def of_layer(directory, layer):
    return load_file(directory / f"layer-{layer:03d}.safetensors")["gradients"]


@pytest.mark.parametrize(("name", "layer"), [("llama", 0), ("llama", 2), ("llama", LAST), ("gemma3_text", 1)])
def test_gradients_are_those_of_the_whole_model(name, layer, measured, model_of, activations_of, ids_NT):
    draws_NST = fisher.uniform_draws(gradients_work(), *ids_NT.shape)
    expected = torch.stack(list(reference_gradients(model_of(name), ids_NT, draws_NST, layer)))
    found = of_layer(measured(activations=activations_of(name)), layer)
    assert found.shape == (*draws_NST.shape, 32)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_gradients_do_not_depend_on_chunks_and_batches(measured, monkeypatch):
    whole = measured()
    monkeypatch.setitem(predictions.CHUNK_BYTES, "cpu", 4 * 95 * 5)
    in_parts = measured(name="in-parts")
    for layer in range(LAST + 1):
        torch.testing.assert_close(of_layer(in_parts, layer), of_layer(whole, layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layer", "block"), [(0, "attn:kv4+ffn:no_op"), (3, "attn:no_op+ffn:no_op")])
def test_the_mean_over_many_labels_is_the_second_order_kl(layer, block, measured, activations, model, ids_NT):
    found = fisher.estimate_score(work(layer, block), activations, {}, measured(samples=200))
    entering = "post_attention" if block.startswith("attn:kv4") else "layer_input"
    change_NTD = getattr(activations, entering)(layer) - activations.layer_input(layer + 1)
    expected = second_order_kl(model, ids_NT, layer, change_NTD)
    assert found.kl_nats_per_token == pytest.approx(expected, rel=0.15)
    assert (found.method, found.tokens) == ("fisher", 96)
    assert (found.lm_loss_increase_nats_per_token, found.top1_agreement) == (None, None)


def test_a_small_change_has_its_exact_score(measured, activations, parent):
    """The parent's FFN without one channel, and 2 % off: second order is enough there."""
    tensors = parent.layer_tensors(1)
    state = {name: tensor[:47] for name, tensor in tensors.items() if "gate" in name or "up_proj" in name}
    state["post_attention_layernorm.weight"] = tensors["post_attention_layernorm.weight"]
    state["mlp.down_proj.weight"] = 1.02 * tensors["mlp.down_proj.weight"][:, :47]
    block, weights = "attn:kv4+ffn:i47", {"ffn:i47": state}
    exact = exact_score(1, block, activations, weights)
    found = fisher.estimate_score(work(1, block), activations, weights, measured(samples=200))
    assert found.kl_nats_per_token == pytest.approx(exact.kl_nats_per_token, rel=0.15)


def test_the_parents_own_block_scores_exactly_zero(measured, activations):
    directory = measured()
    for layer in range(LAST + 1):
        own = fisher.estimate_score(work(layer, "attn:kv4+ffn:i48"), activations, {}, directory)
        assert own.kl_nats_per_token == 0


def test_a_weight_that_is_not_finite_names_layer_and_variant(measured, activations, initial_state):
    weights = {"attn:kv1": initial_state("llama", 3, "attn:kv1")}
    weights["attn:kv1"]["self_attn.q_proj.weight"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 3 attn:kv1\+ffn:i48 is not finite"):
        fisher.estimate_score(work(3, "attn:kv1+ffn:i48"), activations, weights, measured())


def test_gradients_that_are_not_finite_name_their_layer(measured, copy_of, ids_NT, tmp_path):
    directory = copy_of("llama")
    edit_tensors(directory, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].fill_(torch.nan))
    damaged = Activations(tmp_path / "states", Parent(ParentSpec(path=str(directory))), ids_NT, torch.float32, CPU)
    damaged.capture_embedding()
    for layer in range(LAST + 1):
        damaged.capture_layer(layer)
    with pytest.raises(NonFiniteError, match="output of layer 4 are not finite"):
        measured(activations=damaged)


def test_a_disk_without_room_is_an_error_that_says_how_much_is_needed(activations, small_disk):
    with pytest.raises(StorageError, match=r"cannot reserve 614,400 bytes for .*layer-004"):
        fisher.measure_gradients(gradients_work(50), activations, small_disk)


def test_estimates_rank_blocks_as_exact_scores_do(measured, activations, initial_state, parent):
    directory = measured(samples=8)
    spec = VariantsSpec(kv_heads=(2,), ffn_ratios=(0.75, 0.5), linear=True, no_op=True)
    estimates, exact = [], []
    for layer in (0, 2, LAST):
        for block in spec.blocks_of_layer(layer, parent.shape)[1:]:
            weights = {str(v): initial_state("llama", layer, str(v)) for v in block.subblocks}
            estimate = fisher.estimate_score(work(layer, str(block)), activations, weights, directory)
            estimates.append(estimate.kl_nats_per_token)
            exact.append(exact_score(layer, str(block), activations, weights).kl_nats_per_token)
    assert len(exact) == 3 * 19
    assert spearmanr(estimates, exact).statistic > 0.9
