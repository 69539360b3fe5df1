"""Blockwise local distillation of one subblock variant, decoupled (METHOD section 3; Puzzle paper, section 3).

The variant gets the parent's activations that enter its layer and imitates what leaves the layer, the layer's other
subblock being the parent's own and frozen. An attention variant therefore trains through the parent's FFN; an FFN
variant starts from the stored post-attention state and so never runs an attention.
"""

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
from puzzle_core.state_dict import State
from puzzle_core.work import BldRecord, BldWork

DIVERGED_LOSS = 0.05
"""A loss below this is no divergence, however good the start was; 1 is what predicting nothing costs."""


def run(
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
    batch = spec.batch_tokens // length
    steps = max(1, windows * spec.epochs // batch)

    def losses(step: int) -> dict[str, torch.Tensor]:
        rows = batch_rows(step, batch, windows)
        entered, left = inputs[rows].to(device), targets[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            output = frozen.feed(block.attend(entered, **context)) if attends else block.feed(entered)
        return {"loss": normalised_mse(left, output)}

    def whole_batch(step: int) -> list[MicroBatch]:
        return [partial(losses, step)]

    started, what = time.monotonic(), f"BLD of layer {work.layer} {work.variant}"
    terms = train(what, parameters, whole_batch, steps, spec.optimizer, checkpoints, report)
    curve = [term["loss"] for term in terms]
    tail = curve[-max(1, steps // 10) :]
    final = sum(tail) / len(tail)
    if final > max(2 * curve[0], DIVERGED_LOSS):
        raise NonFiniteError(
            f"{what} diverged: its loss went from {curve[0]:.4g} to {final:.4g} in {steps} steps; lower "
            f"bld.optimizer.learning_rate (now {spec.optimizer.learning_rate})"
        )
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, out_dir / WEIGHTS)
    return BldRecord(
        layer=work.layer,
        variant=work.variant,
        initial_loss=curve[0],
        final_loss=final,
        curve=tuple(curve),
        tokens=steps * spec.batch_tokens,
        seconds=time.monotonic() - started,
    )


def initial_state(activations: Activations, work: BldWork, contributions_dir: Path | None) -> State:
    """The variant's training-free initial weights."""
    parent, variant = activations.parent, work.variant
    contribution_I = load_contribution(contributions_dir, work.layer) if contributions_dir else None
    return variant.row.initial_state(parent.layer_tensors(work.layer), parent.shape, variant.size, contribution_I)
