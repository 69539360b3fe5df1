"""Comparison chunk by chunk: the values and gradients of whole logits, with only a chunk's logits in memory."""

import pytest
import torch

from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.model import predictions
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.predictions import chunks, from_states, per_token
from tests.conftest import CPU, MIXED
from tests.pico import SIZES


def measure(parent_CV, child_CV, following_C):
    return kl_divergence(parent_CV, child_CV), next_token_loss(child_CV, following_C)


@pytest.fixture
def models(assemble, parent):
    return load_parent(parent, torch.float32, CPU), load_child(assemble("llama", MIXED), torch.float32, CPU)


def small_chunks(monkeypatch, tokens):
    monkeypatch.setitem(predictions.CHUNK_BYTES, "cpu", 4 * SIZES["vocab_size"] * tokens)


def values_and_gradients(models, ids_NT):
    parent, child = models
    with torch.no_grad():
        parent_NTD = parent.model(input_ids=ids_NT.long()).last_hidden_state
    child.zero_grad()
    child_NTD = child.model(input_ids=ids_NT.long()).last_hidden_state
    kl, loss = per_token(measure, from_states(parent, parent_NTD), child, child_NTD, ids_NT.long())
    (kl.mean() + loss[:, :-1].mean()).backward()
    return kl, loss[:, :-1], [p.grad.clone() for p in child.parameters()]


def test_chunks_cover_all_tokens_once_within_their_size(monkeypatch):
    small_chunks(monkeypatch, 7)
    parts = list(chunks(30, SIZES["vocab_size"], CPU))
    assert [token for part in parts for token in range(30)[part]] == list(range(30))
    assert {part.stop - part.start for part in parts} == {7, 2}


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_values_and_gradients_are_those_of_whole_logits(tokens, models, ids_NT, monkeypatch):
    expected = values_and_gradients(models, ids_NT)
    parent_NTV, child_NTV = (m(input_ids=ids_NT.long()).logits.log_softmax(-1) for m in models)
    torch.testing.assert_close(expected[0], kl_divergence(parent_NTV, child_NTV))
    small_chunks(monkeypatch, tokens)
    for value, whole in zip(values_and_gradients(models, ids_NT), expected, strict=True):
        torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_the_size_of_all_logits_is_made(models, ids_NT, monkeypatch):
    small_chunks(monkeypatch, 8)
    rows = []

    def saved(tensor):
        rows.append(tensor.numel() / tensor.shape[-1] if tensor.shape[-1:] == (SIZES["vocab_size"],) else 0)
        return tensor

    for model in models:
        model.lm_head.register_forward_hook(lambda _, __, output: saved(output))
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        values_and_gradients(models, ids_NT)
    assert max(rows) == 8


def test_equal_models_differ_in_nothing(models, ids_NT, monkeypatch):
    small_chunks(monkeypatch, 8)
    kl, _, gradients = values_and_gradients((models[0], models[0].requires_grad_(True)), ids_NT)
    assert kl.eq(0).all()
    assert len(gradients) > 0
