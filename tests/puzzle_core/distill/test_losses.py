"""Losses and divergences: zero at equality, and the values of the textbook elsewhere."""

import math

import pytest
import scipy.stats
import torch

from puzzle_core.distill.losses import (
    cosine_distance,
    kl_divergence,
    next_token_loss,
    normalised_mse,
    token_normalised_mse,
)


@pytest.fixture
def pair():
    """Two unequal tensors of logits (or of states)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 50, generator=generator) * 3, torch.randn(2, 3, 50, generator=generator) * 3


def kl_per_token(parent, child):
    return kl_divergence(parent.log_softmax(-1), child.log_softmax(-1))


def gradient_at_equality(loss, values):
    child = values.clone().requires_grad_()
    loss(values, child).sum().backward()
    return child.grad


def test_kl_is_exactly_zero_at_equality_with_a_zero_gradient(pair):
    assert kl_per_token(pair[0], pair[0].clone()).eq(0).all()
    assert gradient_at_equality(kl_per_token, pair[0]).abs().max() < 1e-6


def test_kl_is_never_negative_and_is_that_of_scipy(pair):
    parent, child = pair
    expected = scipy.stats.entropy(parent.double().softmax(-1), child.double().softmax(-1), axis=-1)
    assert (kl_per_token(parent, child) > 0).all()
    torch.testing.assert_close(kl_per_token(parent, child).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_kl_is_from_the_parent_to_the_child(pair):
    assert not torch.allclose(kl_per_token(*pair), kl_per_token(*reversed(pair)), rtol=0.01)


def test_kl_survives_extreme_logits():
    sure, sure_otherwise = torch.tensor([[[1e4, 0.0]]]), torch.tensor([[[0.0, 1e4]]])
    assert kl_per_token(sure, sure_otherwise).item() == pytest.approx(1e4)


@pytest.mark.parametrize("loss", [normalised_mse, token_normalised_mse])
def test_normalised_mse_is_0_at_equality_and_1_for_a_child_that_says_nothing(loss, pair):
    parent, child = pair
    assert loss(parent, parent).item() == 0
    assert loss(parent, torch.zeros_like(parent)).item() == pytest.approx(1)
    assert loss(parent * 8, child * 8).item() == pytest.approx(loss(parent, child).item())
    assert gradient_at_equality(loss, parent).eq(0).all()


def test_by_token_every_token_counts_alike(pair):
    parent, child = pair
    of_tokens = [normalised_mse(p, c) for p, c in zip(parent.flatten(0, 1), child.flatten(0, 1), strict=True)]
    torch.testing.assert_close(token_normalised_mse(parent, child), torch.stack(of_tokens).mean())
    huge = torch.ones(2, 3, 1)
    huge[:, 0] = 1000
    torch.testing.assert_close(token_normalised_mse(parent * huge, child * huge), token_normalised_mse(parent, child))
    first = normalised_mse(parent[:, 0], child[:, 0])
    torch.testing.assert_close(normalised_mse(parent * huge, child * huge), first, rtol=1e-4, atol=0)


def test_by_token_a_parent_that_says_nothing_gives_no_nan():
    silent = torch.zeros(1, 2, 4)
    assert token_normalised_mse(silent, silent).item() == 0


def test_cosine_distance_is_the_mean_of_1_minus_cos():
    parent = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]])
    child = torch.tensor([[[5.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    assert cosine_distance(parent, child).item() == pytest.approx((0 + 1 + 2) / 3)


def test_next_token_loss_is_the_surprise_of_the_token_that_follows(pair):
    log_probabilities, following = pair[0].log_softmax(-1).flatten(0, 1), torch.arange(6)
    expected = [-log_probabilities[token, token].item() for token in range(6)]
    torch.testing.assert_close(next_token_loss(log_probabilities, following), torch.tensor(expected))


def test_next_token_loss_of_a_uniform_predictor_is_the_log_of_the_vocabulary():
    loss = next_token_loss(torch.zeros(6, 50).log_softmax(-1), torch.arange(6))
    torch.testing.assert_close(loss, torch.full((6,), math.log(50)))
