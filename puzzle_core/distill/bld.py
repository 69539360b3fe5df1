"""Blockwise local distillation of one subblock variant, decoupled (METHOD section 3; Puzzle paper, section 3).

The variant gets the parent's activations that enter its layer and imitates what leaves the layer, the layer's other
subblock being the parent's own and frozen. An attention variant therefore trains through the parent's FFN; an FFN
variant starts from the stored post-attention state and so never runs an attention.
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
from puzzle_core.distill.loop import Checkpoints, MicroBatch, Progress, train
from puzzle_core.distill.losses import normalised_mse
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import Activations
from puzzle_core.model.surgery import WEIGHTS, variant_block
from puzzle_core.sizes import held_back_windows
from puzzle_core.state_dict import State
from puzzle_core.work import BldRecord, BldWork

log = logging.getLogger("puzzle")
DIVERGED_LOSS = 0.05
"""A loss below this is no divergence, however good the start was; 1 is what predicting nothing costs."""


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
        NonFiniteError: the training diverged; names the layer and the variant.
    """
    parent, spec = activations.parent, work.spec
    state = initial_state(activations, work, contributions_dir)
    block = variant_block(parent, work.layer, work.variant, state, torch.float32, activations.device)
    parameters = {name: parameter.requires_grad_(True) for name, parameter in block.named_parameters()}
    frozen = parent.block(work.layer, activations.dtype, activations.device)
    attends, context = work.variant.subblock == "attn", activations.context()
    inputs = activations.layer_input(work.layer) if attends else activations.post_attention(work.layer)
    targets, device = activations.layer_input(work.layer + 1), activations.device
    windows, length = activations.ids_NT.shape
    held_back = held_back_windows(windows)
    batch, training_windows = spec.batch_tokens // length, windows - held_back
    steps = max(1, windows * spec.epochs // batch)

    def loss_of(rows: slice | list[int]) -> torch.Tensor:
        entered, left = inputs[rows].to(device), targets[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            output = frozen.feed(block.attend(entered, **context)) if attends else block.feed(entered)
        return normalised_mse(left, output)

    def losses(step: int) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(batch_rows(step, batch, training_windows))}

    @torch.no_grad()
    def held_back_loss() -> float:
        first = training_windows if held_back else 0
        parts = [slice(n, min(n + batch, windows)) for n in range(first, windows, batch)]
        total = sum(float(loss_of(part)) * (part.stop - part.start) for part in parts)
        return total / (windows - first)

    def whole_batch(step: int) -> list[MicroBatch]:
        return [partial(losses, step)]

    started, what = time.monotonic(), f"BLD of layer {work.layer} {work.variant}"
    initial = held_back_loss()
    untrained = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    terms = train(what, parameters, whole_batch, steps, spec.optimizer, checkpoints, report)
    final, rate = held_back_loss(), spec.optimizer.learning_rate
    if final > max(2 * initial, DIVERGED_LOSS):
        raise NonFiniteError(
            f"{what} diverged: its loss went from {initial:.4g} to {final:.4g} in {steps} steps; lower "
            f"bld.optimizer.learning_rate (now {rate})"
        )
    trained = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    if final > initial:
        log.warning(
            "%s did not help: its loss on held-back windows went from %.4g to %.4g, so the initial weights are kept; "
            "try bld.optimizer.learning_rate %.2g (now %g)",
            *(what, initial, final, rate / 4, rate),
        )
        trained = untrained
    save_file(trained, out_dir / WEIGHTS)
    curve = [term["loss"] for term in terms]
    return BldRecord(
        layer=work.layer,
        variant=work.variant,
        initial_loss=initial,
        final_loss=min(initial, final),
        curve=tuple(curve),
        tokens=steps * spec.batch_tokens,
        seconds=time.monotonic() - started,
    )


def initial_state(activations: Activations, work: BldWork, contributions_dir: Path | None) -> State:
    """The variant's training-free initial weights."""
    parent, variant = activations.parent, work.variant
    contribution_I = load_contribution(contributions_dir, work.layer) if contributions_dir else None
    return variant.row.initial_state(parent.layer_tensors(work.layer), parent.shape, variant.size, contribution_I)
