"""Which initial weights a variant's training starts from: the best ones by its own loss (METHOD section 2).

Beside those that a variant always has (`initial_weights` in variants/kinds.py) its kind may have others, made from what
the parent's own subblock computes on one batch. BLD's loss before any training decides, on the same batch.

Legend: B batch, T tokens, D hidden width, N tokens of all windows, I channels that enter a subblock's last projection.
"""

from collections.abc import Callable

import torch

from puzzle_core.architecture import Variant
from puzzle_core.distill.batches import Batch
from puzzle_core.distill.importance import without
from puzzle_core.errors import NonFiniteError
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.activations import Activations
from puzzle_core.state_dict import State
from puzzle_core.work import BldWork

DEFAULT = "default"
Parts = list[Callable[[], Batch]]
"""The micro-batches of a batch, as functions."""


def best_of(
    state: State,
    work: BldWork,
    variant: Variant,
    activations: Activations,
    parts: Parts,
    loss: Callable[[Parts, State], float],
) -> tuple[State, dict[str, float]]:
    """The weights of the least loss, and the loss of each way that there is, by its name.

    Args:
        state: the weights that the variant has by default.
        variant: the one that the work trains.
        parts: of the batch that decides.
        loss: the loss of weights on a batch.

    Raises:
        NonFiniteError: no way has a finite loss.
    """
    row, parent = variant.row, activations.parent
    if not row.other_weights:
        return state, {}
    inner_NI = torch.cat([_inner(work.layer, variant, activations, part()) for part in parts])
    shape = parent.shape.of_layer(work.layer)
    states = {DEFAULT: state}
    states |= row.other_states(parent.layer_tensors(work.layer), shape, variant.size, inner_NI)
    losses = {name: loss(parts, other) for name, other in states.items()}
    finite = {name: value for name, value in losses.items() if value < float("inf")}
    if not finite:
        label = f"BLD of layer {work.layer} {variant}"
        raise NonFiniteError(f"{label}: no initial weights have a finite loss ({losses})")
    return states[min(finite, key=finite.__getitem__)], finite


@torch.no_grad()
def _inner(layer: int, variant: Variant, activations: Activations, batch: Batch) -> torch.Tensor:
    """What enters the last projection of the parent's own subblock, (N, I)."""
    family = FAMILIES[activations.parent.shape.family]
    block = activations.parent.block(layer, activations.dtype, activations.device)
    entering_BTD = batch.entering.to(activations.dtype)
    if variant.subblock == "ffn":
        channels_of = without(block.ffn_subblock, family.ffn_names.down)
        inner_BTI: torch.Tensor = channels_of(block.normalise_ffn_input(entering_BTD))
    else:
        context = {k: v for k, v in activations.contexts(batch.rows)[layer].items() if k != "narrowed_mask"}
        channels_of = without(block.attention_subblock, family.attention_names.output)
        inner_BTI = channels_of(hidden_states=block.normalise_attention_input(entering_BTD), **context)[0]
    return inner_BTI.flatten(0, 1)
