"""Documents that attention does not cross: a window of two gives what each of them gives alone."""

import pytest
import torch
from safetensors.torch import save_file

from puzzle_core import evaluation
from puzzle_core.architecture import BlockVariant, Variant
from puzzle_core.data import positions_in, read_positions
from puzzle_core.distill import bld, gkd, importance
from puzzle_core.distill.losses import normalised_mse
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.layered import Batch, layered_child
from puzzle_core.model.surgery import variant_block
from puzzle_core.scoring import score_block
from puzzle_core.spec import BldSpec, GkdSpec
from puzzle_core.work import BldWork, EvaluateWork, ImportanceWork, ScoreWork
from tests.conftest import CPU, MIXED

CUTS = (8, 3, 16, 15, 1, 8)
"""The first token of the second document in every window of sixteen; one window has a single document."""
HALVES = torch.arange(6).repeat_interleave(16).view(6, 16) * 2 + torch.tensor([0] * 8 + [1] * 8)


@pytest.fixture(scope="module", name="documents_NT")
def documents():
    """The number of the document of every token, by CUTS."""
    return torch.stack([2 * n + (torch.arange(16) >= cut) for n, cut in enumerate(CUTS)]).int()


def captured(parent, ids_NT, directory, documents_NT=None):
    positions_NT = None if documents_NT is None else positions_in(documents_NT)
    activations = Activations(directory, parent, ids_NT, torch.float32, CPU, positions_NT)
    activations.capture_embedding()
    for layer in range(parent.shape.layers):
        activations.capture_layer(layer)
    return activations


def halves(parent, ids_NT, tmp_path):
    """The states of windows with a document in each half, and those of windows half as long, one for each document."""
    masked = captured(parent, ids_NT, tmp_path / "masked", HALVES)
    return masked, captured(parent, ids_NT.reshape(12, 8), tmp_path / "alone")


def test_positions_start_again_at_documents_and_windows(tmp_path):
    documents_NT = torch.tensor([[4, 4, 4, 5], [5, 5, 6, 7]], dtype=torch.int32)
    save_file({"tokens": documents_NT.clone(), "documents": documents_NT}, tmp_path / "tokens.safetensors")
    assert read_positions(tmp_path).tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_states_are_those_of_every_document_alone(name, parent_of, ids_NT, documents_NT, tmp_path):
    parent = parent_of(name)
    together = captured(parent, ids_NT, tmp_path / "together", documents_NT)
    streamed = together.compute([3, 1], ["layer-input-005", "post-attention-002"])
    for window, cut in enumerate(CUTS):
        for part in {(0, cut), (cut, 16)} - {(16, 16)}:
            alone = captured(parent, ids_NT[window, slice(*part)][None], tmp_path / f"{window}-{part[0]}")
            for layer in range(parent.shape.layers):
                for states in ("post_attention", "layer_input"):
                    wanted_1TD = getattr(alone, states)(layer)
                    found_TD = getattr(together, states)(layer)[window, slice(*part)]
                    torch.testing.assert_close(found_TD, wanted_1TD[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(streamed["layer-input-005"], together.layer_input(5)[[3, 1]])
    assert torch.equal(streamed["post-attention-002"], together.post_attention(2)[[3, 1]])


def test_a_child_of_all_kinds_sees_no_other_document(assemble, ids_NT, documents_NT):
    """Whole and layer by layer; a linear attention and none see no other token anyway."""
    child_dir, ids_NT = assemble("llama", MIXED), ids_NT.long()
    whole, layered = load_child(child_dir, torch.float32, CPU), layered_child(child_dir, torch.float32, CPU)
    positions_NT = positions_in(documents_NT).long()
    with torch.no_grad():
        masked = whole.model(input_ids=ids_NT, position_ids=positions_NT).last_hidden_state
        (by_layer,) = layered.normalised_states([Batch(ids_NT, positions_NT)])
        assert torch.equal(by_layer, masked)
        for window, cut in enumerate(CUTS):
            for part in {(0, cut), (cut, 16)} - {(16, 16)}:
                alone = whole.model(input_ids=ids_NT[window, slice(*part)][None]).last_hidden_state[0]
                torch.testing.assert_close(masked[window, slice(*part)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["attn:kv4+ffn:no_op", "attn:no_op+ffn:i48"])
def test_scores_are_those_of_documents_in_windows_of_their_own(block, parent, ids_NT, tmp_path):
    work = ScoreWork(
        parent="p", layer=1, block=BlockVariant.parse(block), attention=None, ffn=None, tokens="t", dtype="float32"
    )
    masked, alone = (score_block(work, states, {}) for states in halves(parent, ids_NT, tmp_path))
    assert masked.kl_nats_per_token == pytest.approx(alone.kl_nats_per_token, rel=1e-4)
    assert masked.kl_nats_per_token != pytest.approx(score_of_plain_windows(work, parent, ids_NT, tmp_path), rel=1e-2)


def score_of_plain_windows(work, parent, ids_NT, tmp_path):
    return score_block(work, captured(parent, ids_NT, tmp_path / "plain"), {}).kl_nats_per_token


@pytest.mark.parametrize("variant", ["attn:kv1", "attn:linear"])
def test_losses_of_bld_are_those_of_documents_in_windows_of_their_own(variant, parent, ids_NT, tmp_path):
    spec = BldSpec(tokens=96, batch_tokens=16)
    work = BldWork(
        parent="p", layer=2, variant=Variant.parse(variant), tokens="t", contributions=None, seed=0, spec=spec
    )
    masked, alone = halves(parent, ids_NT, tmp_path)
    record, held_back = bld.train_variant(work, masked, None, tmp_path), slice(10, 12)
    block = variant_block(parent, 2, work.variant, bld.initial_state(alone, work, None), torch.float32, CPU)
    with torch.no_grad():
        attended = block.attend(alone.layer_input(2)[held_back], **alone.contexts(held_back)[2])
        output = parent.block(2, torch.float32, CPU).feed(attended)
    expected = normalised_mse(alone.layer_input(3)[held_back], output).item()
    assert record.initial_loss == pytest.approx(expected, rel=1e-4)


def test_gkd_evaluation_and_importance_are_those_of_documents_in_windows_of_their_own(
    parent, assemble, ids_NT, tmp_path
):
    child_dir, spec = assemble("llama", MIXED), GkdSpec()
    models = load_parent(parent, torch.float32, CPU), load_child(child_dir, torch.float32, CPU)
    masked = gkd.loss_terms(*models, ids_NT.long(), spec, positions_in(HALVES.int()).long())
    alone = gkd.loss_terms(*models, ids_NT.long().reshape(12, 8), spec)
    for name, loss in alone.items():
        torch.testing.assert_close(masked[name], loss, rtol=1e-4, atol=1e-6)
    found = []
    for number, states in enumerate(halves(parent, ids_NT, tmp_path)):
        states.capture_log_probabilities()
        record = evaluation.evaluate(EvaluateWork(parent="p", child="c", tokens="t"), states, child_dir)
        tokens = {"tokens": states.ids_NT} | ({"documents": HALVES.int()} if number == 0 else {})
        place = tmp_path / str(number)
        place.mkdir()
        save_file(tokens, place / "tokens.safetensors")
        importance.measure_contributions(ImportanceWork(parent="p", tokens="t"), parent, place, place)
        found.append((record.kl_nats_per_token, importance.load_contribution(place, 3)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
