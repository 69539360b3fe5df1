"""Blockwise local distillation of one subblock variant, decoupled (METHOD section 3; Puzzle paper, section 3).

The variant reads the parent's input of its layer and learns the parent's output of that layer. The layer's other
subblock is the parent's and stays frozen. An attention variant therefore trains through the parent's FFN. An FFN
variant starts from the stored post-attention state, so its training never runs attention.

Legend: B batch, T tokens, D hidden width, I intermediate width.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from puzzle_core.data import batch_rows
from puzzle_core.distill.importance import load_contribution
from puzzle_core.distill.loop import MicroBatch, Progress, micro_batches, train
from puzzle_core.distill.losses import normalised_mse, token_normalised_mse
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import Activations
from puzzle_core.model.surgery import WEIGHTS, variant_block
from puzzle_core.sizes import held_back_windows
from puzzle_core.state_dict import State
from puzzle_core.work import BldRecord, BldWork

log = logging.getLogger("puzzle")
LOSSES = {"tensor": normalised_mse, "token": token_normalised_mse}
"""By the name of `bld.loss`."""
DIVERGED_LOSS = 0.05
"""A final loss below this is no divergence, whatever the initial loss was; an output of zeros has loss 1."""


def train_variant(
    work: BldWork,
    activations: Activations,
    contributions_dir: Path | None,
    out_dir: Path,
    checkpoints: Checkpoints | None = None,
    report: Callable[[Progress], None] | None = None,
) -> BldRecord:
    """Train the variant and write `weights.safetensors` (float32, names within the layer).

    Raises:
        NonFiniteError: the training diverged; the message names the layer and the variant.
    """
    parent, spec = activations.parent, work.spec
    state = initial_state(activations, work, contributions_dir)
    block = variant_block(parent, work.layer, work.variant, state, torch.float32, activations.device)
    parameters = {name: parameter.requires_grad_(True) for name, parameter in block.named_parameters()}
    frozen = parent.block(work.layer, activations.dtype, activations.device)
    is_attention, context = work.variant.subblock == "attn", activations.contexts()[work.layer]
    inputs = activations.layer_input(work.layer) if is_attention else activations.post_attention(work.layer)
    targets, device = activations.layer_input(work.layer + 1), activations.device
    windows, length = activations.ids_NT.shape
    held_back = held_back_windows(windows)
    batch, training_windows = spec.batch_tokens // length, windows - held_back
    steps = max(1, windows * spec.epochs // batch)

    def loss_of(rows: list[int]) -> torch.Tensor:
        input_BTD, target_BTD = inputs[rows].to(device), targets[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            output_BTD = frozen.feed(block.attend(input_BTD, **context)) if is_attention else block.feed(input_BTD)
        return LOSSES[spec.loss](target_BTD, output_BTD)

    def losses(step: int) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(batch_rows(step, batch, training_windows, work.seed))}

    @torch.no_grad()
    def held_back_loss() -> float:
        first = training_windows if held_back else 0
        total = sum(float(loss_of(rows)) * len(rows) for rows in micro_batches(range(first, windows), batch))
        return total / (windows - first)

    def whole_batch(step: int) -> list[MicroBatch]:
        return [partial(losses, step)]

    started, label = time.monotonic(), f"BLD of layer {work.layer} {work.variant}"
    initial = held_back_loss()
    untrained = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    past = train(label, parameters, whole_batch, steps, spec.optimizer, checkpoints, report)
    final, rate = held_back_loss(), spec.optimizer.learning_rate
    if final > max(2 * initial, DIVERGED_LOSS):
        raise NonFiniteError(
            f"{label} diverged: its loss went from {initial:.4g} to {final:.4g} in {steps} steps; lower "
            f"bld.optimizer.learning_rate (now {rate})"
        )
    trained = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    if final > initial:
        log.warning(
            "%s did not help: its loss on held-back windows went from %.4g to %.4g, so the initial weights are kept; "
            "try bld.optimizer.learning_rate %.2g (now %g)",
            *(label, initial, final, rate / 4, rate),
        )
        trained = untrained
    save_file(trained, out_dir / WEIGHTS)
    return BldRecord(
        layer=work.layer,
        variant=work.variant,
        initial_loss=initial,
        final_loss=min(initial, final),
        curve=tuple(terms["loss"] for terms in past.curve),
        tokens=steps * spec.batch_tokens,
        seconds=time.monotonic() - started,
    )


def initial_state(activations: Activations, work: BldWork, contributions_dir: Path | None) -> State:
    """Compute the variant's initial weights from the parent's, without training."""
    parent, variant = activations.parent, work.variant
    contribution_I = load_contribution(contributions_dir, work.layer) if contributions_dir else None
    return variant.row.initial_state(parent.layer_tensors(work.layer), parent.shape, variant.size, contribution_I)
