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

import torch

from puzzle_core.distill.losses import kl_of_log_probabilities
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import Activations
from puzzle_core.model.surgery import Halves, State, halves
from puzzle_core.stages import ScoreRecord, ScoreWork

COMPARED_TOKENS = 512
"""Tokens whose predictions are compared at a time: few enough that they stay in a processor's cache."""


@torch.no_grad()
def run(work: ScoreWork, activations: Activations, weights: dict[str, State]) -> ScoreRecord:
    """Score one block variant.

    Args:
        activations: of the parent, or the child that the block is put into, captured through the last layer.
        weights: the trained weights by variant id.

    Raises:
        NonFiniteError: a score is NaN or infinite; names the layer and the variant.
    """
    parent, dtype, device = activations.parent, activations.dtype, activations.device
    trained = {v: weights[str(v)] for v in (work.block.attention, work.block.ffn) if str(v) in weights}
    block = halves(parent, work.layer, work.block, trained, dtype, device)
    hidden = _through_block(work, activations, block)
    for layer in range(work.layer + 1, parent.shape.layers):
        own, context = activations.block(layer), activations.context()
        hidden = [own(batch, **context) for batch in hidden]
    return _compare(work, activations, hidden)


def _through_block(work: ScoreWork, activations: Activations, block: Halves) -> list[torch.Tensor]:
    context, device = activations.context(), activations.device
    if work.block.attention == activations.attention(work.layer):
        states = activations.middle(work.layer)
        return [block.ffn.feed(states[rows].to(device)) for rows in activations.batches()]
    states = activations.entry(work.layer)
    return [block(states[rows].to(device), **context) for rows in activations.batches()]


def _compare(work: ScoreWork, activations: Activations, hidden: list[torch.Tensor]) -> ScoreRecord:
    kl = loss_increase = agreed = 0.0
    few = max(1, COMPARED_TOKENS // activations.ids_NT.shape[1])
    for first, batch in enumerate(torch.split(torch.cat(hidden), few)):
        rows = slice(first * few, first * few + len(batch))
        parent_BTV = activations.log_probabilities(rows).to(batch.device)
        child_BTV = activations.log_softmax(batch)
        following_BT1 = activations.ids_NT[rows, 1:, None].long().to(batch.device)
        kl += kl_of_log_probabilities(parent_BTV, child_BTV).sum(dtype=torch.float64).item()
        lost = parent_BTV[:, :-1].gather(-1, following_BT1) - child_BTV[:, :-1].gather(-1, following_BT1)
        loss_increase += lost.sum(dtype=torch.float64).item()
        agreed += (parent_BTV.argmax(-1) == child_BTV.argmax(-1)).sum().item()
    windows, length = activations.ids_NT.shape
    values = (kl / (windows * length), loss_increase / (windows * (length - 1)), agreed / (windows * length))
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
