"""Replace-1-block scores (METHOD section 4; Puzzle paper, section 4.2).

A score compares the parent with a copy of it in which exactly one block is replaced: the mean over held-out tokens of
KL(parent || modified), in nats per token. The same pass gives the increase of the next-token loss and the top-1
agreement. The layers before the replaced block are unchanged and are not run again: a score starts from the stored
input of the block, or from the stored post-attention state where only the FFN is replaced, and runs the rest of the
model.

An iterated search replaces one block of a child instead of the parent. The result is still compared with the parent.

Legend: N windows, B batch, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import FORWARD_TOKENS, Activations
from puzzle_core.model.predictions import per_token
from puzzle_core.model.surgery import Subblocks, load_subblocks
from puzzle_core.state_dict import State
from puzzle_core.work import ScoreRecord, ScoreWork

COMPARED_TOKENS = 512
"""Tokens per forward pass of a score on a CPU: few enough for their activations to stay in its cache."""


@torch.no_grad()
def score_block(work: ScoreWork, activations: Activations, weights: dict[str, State]) -> ScoreRecord:
    """Score one block variant.

    Args:
        activations: those of the model whose block is replaced, parent or child, captured through the last layer.
        weights: trained weights by variant id.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the layer and the block.
    """
    parent, dtype, device = activations.parent, activations.dtype, activations.device
    trained = {v: weights[str(v)] for v in (work.block.attention, work.block.ffn) if str(v) in weights}
    block = load_subblocks(parent, work.layer, work.block, trained, dtype, device)
    suffix = [activations.block(layer) for layer in range(work.layer + 1, parent.shape.layers)]
    contexts, comparison = activations.contexts(), _TokenComparison()
    for rows in _window_batches(activations):
        hidden = block_output(work, activations, block, rows, contexts[work.layer])
        for following_block, context in zip(suffix, contexts[work.layer + 1 :], strict=True):
            hidden = following_block(hidden, **context)
        comparison.add(activations, rows, hidden)
    return _record(work, activations, comparison)


def _window_batches(activations: Activations) -> Iterator[slice]:
    tokens = COMPARED_TOKENS if activations.device.type == "cpu" else FORWARD_TOKENS
    windows = max(1, tokens // activations.ids_NT.shape[1])
    return (slice(first, first + windows) for first in range(0, len(activations.ids_NT), windows))


def block_output(
    work: ScoreWork, activations: Activations, block: Subblocks, rows: slice, context: dict[str, Any]
) -> torch.Tensor:
    """What leaves the replaced block, (B, T, D), for some windows of the stored states."""
    if work.block.attention == activations.attention(work.layer):
        return block.feed(activations.post_attention(work.layer)[rows].to(activations.device))
    return block(activations.layer_input(work.layer)[rows].to(activations.device), **context)


class _TokenComparison:
    """Running sums over the compared tokens."""

    kl = loss_increase = agreed = 0.0

    def add(self, activations: Activations, rows: slice, final_BTD: torch.Tensor) -> None:
        """Compare the predictions from the last layer's output with the parent's, and add the results to the sums."""
        outside, ids_BT = activations.outside(), activations.ids_NT[rows].long().to(final_BTD.device)
        kl_BT, increase_BT, agreed_BT = per_token(
            _differences, activations.predictions(rows), outside, outside.model.normalise(final_BTD), ids_BT
        )
        self.kl += kl_BT.sum(dtype=torch.float64).item()
        self.loss_increase += increase_BT[:, :-1].sum(dtype=torch.float64).item()
        self.agreed += agreed_BT.sum().item()


def _differences(
    parent_CV: torch.Tensor, child_CV: torch.Tensor, following_C: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """KL, the increase of the next-token loss, and whether both have the same first choice."""
    return (
        kl_divergence(parent_CV, child_CV),
        next_token_loss(child_CV, following_C) - next_token_loss(parent_CV, following_C),
        parent_CV.argmax(-1) == child_CV.argmax(-1),
    )


def _record(work: ScoreWork, activations: Activations, comparison: _TokenComparison) -> ScoreRecord:
    windows, length = activations.ids_NT.shape
    values = (
        comparison.kl / (windows * length),
        comparison.loss_increase / (windows * (length - 1)),
        comparison.agreed / (windows * length),
    )
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"the score of layer {work.layer} {work.block} is not finite (KL {values[0]})")
    return ScoreRecord(
        layer=work.layer,
        block=work.block,
        kl_nats_per_token=max(values[0], 0.0),
        lm_loss_increase_nats_per_token=values[1],
        top1_agreement=values[2],
        tokens=windows * length,
    )
