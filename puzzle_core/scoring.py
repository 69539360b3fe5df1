"""Replace-1-block scores (METHOD section 4; Puzzle paper, section 4.2).

The parent with exactly one block replaced, against the parent: mean over held-out tokens of KL(parent || modified),
in nats per token, and from the same pass the increase of the next-token loss and the top-1 agreement. Everything
before the replaced block is unchanged and is never run again: a score starts from the stored activations that enter
the block (or, for an FFN variant alone, that leave the attention) and runs the suffix of the model.

An iterated search scores blocks in a child instead of the parent: then one block of the child is replaced, and the
result is still compared with the parent.

Legend: N windows, T tokens, D hidden width, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from puzzle_core.distill.losses import kl_of_log_probabilities
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import FORWARD_TOKENS, Activations
from puzzle_core.model.surgery import Subblocks, load_subblocks
from puzzle_core.state_dict import State
from puzzle_core.work import ScoreRecord, ScoreWork

COMPARED_TOKENS = 512
"""Tokens that go through the suffix and are compared at a time on a CPU: few enough to stay in its cache."""


@torch.no_grad()
def score_block(work: ScoreWork, activations: Activations, weights: dict[str, State]) -> ScoreRecord:
    """Score one block variant.

    Args:
        activations: of the parent, or the child that the block is put into, captured through the last layer.
        weights: the trained weights by variant id.

    Raises:
        NonFiniteError: a score is NaN or infinite; names the layer and the variant.
    """
    parent, dtype, device = activations.parent, activations.dtype, activations.device
    trained = {v: weights[str(v)] for v in (work.block.attention, work.block.ffn) if str(v) in weights}
    block = load_subblocks(parent, work.layer, work.block, trained, dtype, device)
    suffix = [activations.block(layer) for layer in range(work.layer + 1, parent.shape.layers)]
    context, compared = activations.context(), _TokenComparison()
    for rows in _few_windows(activations):
        hidden = _through_block(work, activations, block, rows, context)
        for own in suffix:
            hidden = own(hidden, **context)
        compared.add(activations, rows, hidden)
    return _record(work, activations, compared)


def _few_windows(activations: Activations) -> Iterator[slice]:
    tokens = COMPARED_TOKENS if activations.device.type == "cpu" else FORWARD_TOKENS
    few = max(1, tokens // activations.ids_NT.shape[1])
    return (slice(first, first + few) for first in range(0, len(activations.ids_NT), few))


def _through_block(
    work: ScoreWork, activations: Activations, block: Subblocks, rows: slice, context: dict[str, Any]
) -> torch.Tensor:
    if work.block.attention == activations.attention(work.layer):
        return block.feed(activations.post_attention(work.layer)[rows].to(activations.device))
    return block(activations.layer_input(work.layer)[rows].to(activations.device), **context)


class _TokenComparison:
    """Sums over the tokens compared so far."""

    kl = loss_increase = agreed = 0.0

    def add(self, activations: Activations, rows: slice, final_BTD: torch.Tensor) -> None:
        """Compare the predictions that follow from what leaves the last layer with the parent's."""
        parent_BTV = activations.log_probabilities(rows).to(final_BTD.device)
        child_BTV = activations.log_softmax(final_BTD)
        following_BT1 = activations.ids_NT[rows, 1:, None].long().to(final_BTD.device)
        self.kl += kl_of_log_probabilities(parent_BTV, child_BTV).sum(dtype=torch.float64).item()
        lost = parent_BTV[:, :-1].gather(-1, following_BT1) - child_BTV[:, :-1].gather(-1, following_BT1)
        self.loss_increase += lost.sum(dtype=torch.float64).item()
        self.agreed += (parent_BTV.argmax(-1) == child_BTV.argmax(-1)).sum().item()


def _record(work: ScoreWork, activations: Activations, compared: _TokenComparison) -> ScoreRecord:
    windows, length = activations.ids_NT.shape
    values = (
        compared.kl / (windows * length),
        compared.loss_increase / (windows * (length - 1)),
        compared.agreed / (windows * length),
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
