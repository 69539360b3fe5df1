"""Losses of BLD and GKD, and the divergence that scores use; all are computed in float32 or better.

Legend: B batch, T tokens, D hidden width, V vocabulary.
"""

import torch
from torch.nn import functional as F


def normalised_mse(parent_BTD: torch.Tensor, child_BTD: torch.Tensor) -> torch.Tensor:
    """MSE(o_parent, o_child) / MSE(o_parent, 0): one scalar per block (Puzzle paper, section 3)."""
    parent_BTD = parent_BTD.float()
    return F.mse_loss(child_BTD.float(), parent_BTD) / parent_BTD.square().mean()


def kl_per_token(parent_BTV: torch.Tensor, child_BTV: torch.Tensor) -> torch.Tensor:
    """KL(parent || child) of the next-token distributions, in nats, (B, T); exactly 0 for equal logits."""
    return kl_of_log_probabilities(parent_BTV.float().log_softmax(-1), child_BTV.float().log_softmax(-1))


def kl_of_log_probabilities(parent_BTV: torch.Tensor, child_BTV: torch.Tensor) -> torch.Tensor:
    """KL(parent || child) per token in nats, (B, T), from log-probabilities."""
    return (parent_BTV.exp() * (parent_BTV - child_BTV)).sum(-1)


def cosine_distance(parent_BTD: torch.Tensor, child_BTD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of 1 - cos(h_child, h_parent), a scalar."""
    return 1 - F.cosine_similarity(child_BTD.float(), parent_BTD.float(), dim=-1).mean()


def next_token_loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first of each window, in nats, (B, T-1)."""
    flat = F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids_BT), -1)
