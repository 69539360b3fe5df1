"""Losses of BLD and GKD, and the divergence that scores use; all are computed in float32 or better.

Legend: B batch, T tokens, C tokens in any order, D hidden width, V vocabulary.
"""

import torch
from torch.nn import functional as F


def normalised_mse(
    parent_BTD: torch.Tensor, child_BTD: torch.Tensor, mean_square: float | torch.Tensor | None = None
) -> torch.Tensor:
    """MSE(o_parent, o_child) / MSE(o_parent, 0): one scalar per block (Puzzle paper, section 3).

    A micro-batch is given the denominator of its whole batch, `mean_square`.
    """
    parent_BTD = parent_BTD.float()
    return F.mse_loss(child_BTD.float(), parent_BTD) / (
        parent_BTD.square().mean() if mean_square is None else mean_square
    )


def token_normalised_mse(parent_BTD: torch.Tensor, child_BTD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of MSE(o_parent, o_child) / MSE(o_parent, 0), each of its own token: one scalar per block.

    Every token counts alike. In `normalised_mse` a few with huge activations, as first tokens often have, outweigh all
    others.
    """
    parent_BTD = parent_BTD.float()
    squares_BT = parent_BTD.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((child_BTD.float() - parent_BTD).square().mean(-1) / squares_BT).mean()


def kl_divergence(parent_CV: torch.Tensor, child_CV: torch.Tensor) -> torch.Tensor:
    """KL(parent || child) per token in nats, (C,), from log-probabilities; exactly 0 where they are equal."""
    return (parent_CV.exp() * (parent_CV - child_CV)).sum(-1)


def next_token_loss(log_probabilities_CV: torch.Tensor, following_C: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of the tokens that follow, in nats, (C,)."""
    return -log_probabilities_CV.gather(-1, following_C.unsqueeze(-1)).squeeze(-1)


def cosine_distance(parent_BTD: torch.Tensor, child_BTD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of 1 - cos(h_child, h_parent), a scalar."""
    return 1 - F.cosine_similarity(child_BTD.float(), parent_BTD.float(), dim=-1).mean()
