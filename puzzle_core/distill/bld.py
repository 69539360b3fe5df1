"""Blockwise local distillation of one variant, or of both halves of an option (METHOD section 3; Puzzle paper, 3).

A variant reads the parent's input of its layer and learns the parent's output of that layer. The layer's other subblock
is the parent's and stays frozen: BLD is decoupled. An attention variant therefore trains through the parent's FFN. An
FFN variant starts from the stored post-attention state, so its training never runs attention.

An option trains coupled, both halves at once, from the input of its first layer to the output of its last one.

Legend: B batch, T tokens, D hidden width, I intermediate width.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from puzzle_core.architecture import Option, Variant
from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.distill.batches import Batch, Batches
from puzzle_core.distill.importance import load_contribution
from puzzle_core.distill.initial_weights import best_of
from puzzle_core.distill.loop import MicroBatch, Progress, train
from puzzle_core.distill.losses import normalised_mse, token_normalised_mse
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import NonFiniteError
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock
from puzzle_core.model.surgery import WEIGHTS, load_weights, variant_block
from puzzle_core.spec import BldSource
from puzzle_core.state_dict import State
from puzzle_core.work import BldRecord, BldWork

log = logging.getLogger("puzzle")
Halves = tuple[Path | None, Path | None]
"""Directories of a trained attention and a trained FFN; None for one that was not trained."""
DIVERGED_LOSS = 0.05
"""A final loss below this is no divergence, whatever the initial loss was; an output of zeros has loss 1."""


def train_variant(
    work: BldWork,
    activations: Activations,
    contributions_dir: Path | None,
    out_dir: Path,
    checkpoints: Checkpoints | None = None,
    report: Callable[[Progress], None] | None = None,
    slot: ComputeSlot | None = None,
    source: BldSource = "stored",
    halves: Halves = (None, None),
) -> BldRecord:
    """Train the variant and write `weights.safetensors` (float32, names within the layer).

    Trainings of the same layer in other threads of this process share what they read, or, if `source` is `streamed`,
    all trainings share what the parent computes. Each computes while it has a compute slot: `slot`, by default of a
    device where one thread computes at a time. `halves` are the library artifacts of the work's halves.

    Raises:
        NonFiniteError: the training diverged; the message names the layer and the variant.
    """
    slot = slot or ComputeSlot(str(activations.device), most=1)
    with Batches(work, activations, slot, source) as batches:
        return _train(work, activations, contributions_dir, out_dir, checkpoints, report, batches, halves)


def _train(
    work: BldWork,
    activations: Activations,
    contributions_dir: Path | None,
    out_dir: Path,
    checkpoints: Checkpoints | None,
    report: Callable[[Progress], None] | None,
    batches: Batches,
    halves: Halves,
) -> BldRecord:
    spec, schedule = work.spec, batches.schedule
    state, compared = initial_state(activations, work, contributions_dir, halves), dict[str, float]()
    if spec.initial_weights == "best" and isinstance(work.variant, Variant):
        loss = partial(_start_loss, work, activations)
        state, compared = best_of(state, work, work.variant, activations, batches.at(0), loss)
    block = variant_block(activations.parent, work.layer, work.variant, state, torch.float32, activations.device)
    parameters = {name: parameter.requires_grad_(True) for name, parameter in block.named_parameters()}
    compute, before = _forward(work, activations, block), len(schedule.measuring)

    def losses_at(position: int) -> list[MicroBatch]:
        return _losses(batches.at(position), spec.loss, compute)

    @torch.no_grad()
    def held_back_loss(first: int) -> float:
        total, windows = 0.0, 0
        for position, rows in enumerate(schedule.measuring, first):
            total += sum(part()["loss"].item() for part in losses_at(position)) * len(rows)
            windows += len(rows)
        return total / windows

    label, steps = f"BLD of layer {work.layer} {work.variant}", schedule.steps
    initial = held_back_loss(0)
    untrained = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    past = train(label, parameters, lambda step: losses_at(before + step), steps, spec.optimizer, checkpoints, report)
    final, rate = held_back_loss(before + steps), spec.optimizer.learning_rate
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
        compared=compared,
        final_loss=min(initial, final),
        curve=tuple(terms["loss"] for terms in past.curve),
        tokens=steps * spec.batch_tokens,
        seconds=batches.computed_s,
    )


def _losses(
    parts: list[Callable[[], Batch]], kind: str, compute: Callable[[torch.Tensor, list[int]], torch.Tensor]
) -> list[MicroBatch]:
    """The loss of every micro-batch of a batch, as functions."""
    mean_square = _mean_square(parts) if kind == "tensor" and len(parts) > 1 else None

    def loss(part: Callable[[], Batch]) -> dict[str, torch.Tensor]:
        batch = part()
        output_BTD = compute(batch.entering, batch.rows)
        if kind == "token":
            return {"loss": batch.share * token_normalised_mse(batch.target, output_BTD)}
        return {"loss": batch.share * normalised_mse(batch.target, output_BTD, mean_square)}

    return [partial(loss, part) for part in parts]


@torch.no_grad()
def _start_loss(work: BldWork, activations: Activations, parts: list[Callable[[], Batch]], state: State) -> float:
    """The loss of a variant with these weights on one batch."""
    block = variant_block(activations.parent, work.layer, work.variant, state, torch.float32, activations.device)
    losses = _losses(parts, work.spec.loss, _forward(work, activations, block))
    return sum(loss()["loss"].item() for loss in losses)


def _forward(
    work: BldWork, activations: Activations, block: PuzzleBlock
) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    """The layer's output as a function of what enters the variant in which windows.

    An attention variant goes through the parent's FFN, and an option through its own.
    """
    device, feed, subblock = activations.device, block.feed, getattr(work.variant, "subblock", None)
    if subblock == "attn":
        feed = activations.parent.block(work.layer, activations.dtype, device).feed

    def forward(input_BTD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=work.spec.dtype == "bfloat16"):
            if subblock != "ffn":
                input_BTD = block.attend(input_BTD, **activations.contexts(rows)[work.layer])
            output_BTD = feed(input_BTD)
        assert isinstance(output_BTD, torch.Tensor)
        return output_BTD

    return forward


def _mean_square(parts: list[Callable[[], Batch]]) -> torch.Tensor:
    """The mean square of the parent's output over all micro-batches of a batch."""
    batches = (part() for part in parts)
    return torch.stack([b.share * b.target.float().square().mean() for b in batches]).sum()


def initial_state(
    activations: Activations, work: BldWork, contributions_dir: Path | None, halves: Halves = (None, None)
) -> State:
    """The weights that a training starts from: a variant's from the parent's without training, an option's its halves.

    A half that was not trained is the parent's own, or nothing.
    """
    parent, variant = activations.parent, work.variant
    if isinstance(variant, Option):
        return _of_halves(parent, work.layer, variant, halves)
    contribution_I = load_contribution(contributions_dir, work.layer) if contributions_dir else None
    return variant.row.initial_state(
        parent.layer_tensors(work.layer), parent.shape.of_layer(work.layer), variant.size, contribution_I
    )


def _of_halves(parent: Parent, layer: int, option: Option, halves: Halves) -> State:
    family, state = FAMILIES[parent.shape.family], State()
    own, prefixes = parent.layer_tensors(layer), (family.attention_prefixes, family.ffn_prefixes)
    for variant, directory, subblock_prefixes in zip(option.block.subblocks, halves, prefixes, strict=True):
        if directory:
            state |= load_weights(directory)
        elif not variant.is_empty:
            state |= {name: tensor for name, tensor in own.items() if name.startswith(subblock_prefixes)}
    return state
