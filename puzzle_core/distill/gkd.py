"""Global knowledge distillation: the assembled child learns from the parent end to end (METHOD section 7).

    loss = cosine_weight * sum over layers (1 - cos(h_child, h_parent))
         + kl_weight * KL(parent || child) + lm_weight * LM

Hidden states h are the outputs of the child's layers, and of the last parent's layer that each of them replaces. Child
weights are float32 during training, whatever their saved type.
KL on held-back windows is measured a few times, and the child gets the weights where it was lowest.

Legend: N windows, B batch, T tokens.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from puzzle_core.data import batch_rows, read_positions, read_windows
from puzzle_core.device import default_device
from puzzle_core.distill.held_back import Watch
from puzzle_core.distill.loop import MicroBatch, Progress, micro_batches, train
from puzzle_core.distill.losses import cosine_distance, kl_divergence, next_token_loss
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import ArtifactError
from puzzle_core.model.checkpoint import Checkpoint, write_checkpoint
from puzzle_core.model.child import load_child, load_parent, write_description
from puzzle_core.model.child_config import read_child_config
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.model.predictions import Chunk, from_states, per_token
from puzzle_core.model.recompute import computed_again, recompute_blocks
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.sizes import watched_windows
from puzzle_core.spec import GkdSpec
from puzzle_core.work import GkdRecord, GkdWork, HeldBackKl

SIDE_BY_SIDE_BYTES = 64 * 2**20
"""Largest size of the gradients of all micro-batches that run at the same time: each has a set of its own."""
KL_ALONE = GkdSpec(cosine_weight=0, kl_weight=1, lm_weight=0)

if TYPE_CHECKING:
    from puzzle_core.distill.distributed import ShardedGroup


def distil(
    work: GkdWork,
    parent: Parent,
    child_dir: Path,
    tokens_dir: Path,
    out_dir: Path,
    checkpoints: Checkpoints | None = None,
    report: Callable[[Progress], None] | None = None,
    threads: int = 1,
    group: "ShardedGroup | None" = None,
    recompute: bool = False,
) -> GkdRecord:
    """Distil the child in `child_dir` and write the result as a checkpoint to `out_dir`.

    Args:
        checkpoints: where training state is saved to resume from, and the best weights; None saves no state, and the
            best weights lie in `out_dir` meanwhile.
        report: called after every step.
        threads: micro-batches that run at the same time on a CPU, one thread each, where their gradients take at most
            SIDE_BY_SIDE_BYTES: small models gain more from this than from threads inside their operations. Larger
            models run one micro-batch at a time, on the threads that torch has.
        group: the processes that share this training, if any. All of them call this function; rank 0 writes.
        recompute: whether the backward pass computes the activations of the child's blocks again, as it always does in
            a group. The result is bitwise the same.

    Raises:
        ArtifactError: the child's tensors differ from those that its config requires.
        NonFiniteError: the loss is NaN or infinite.
        StorageError: the checkpoint to resume from cannot be read, or a new one cannot be written.
    """
    spec, device = work.spec, default_device()
    frozen_dtype = torch_dtype(spec.dtype) if device.type == "cuda" else torch.float32
    if group:
        parent_model = group.load(parent.puzzle_config(), parent.checkpoint, frozen_dtype).requires_grad_(False)
        child = group.load(read_child_config(child_dir), Checkpoint(child_dir, ArtifactError), torch.float32)
    else:
        parent_model = load_parent(parent, frozen_dtype, device)
        child = load_child(child_dir, torch.float32, device)
        if recompute:
            recompute_blocks(child)
    parameters = dict(child.named_parameters())
    windows_NT, positions_NT = read_windows(tokens_dir), read_positions(tokens_dir)
    windows, length = windows_NT.shape
    batch = spec.batch_tokens // length
    micro = (spec.micro_batch_tokens or spec.batch_tokens) // length
    if group:
        micro = min(micro, -(-batch // group.mesh.size()))
    imitated = [layer + option.span - 1 for layer, option in work.architecture.options.items()]
    steps = max(1, windows * spec.epochs // batch)
    held_back = watched_windows(windows, spec.held_back_checks)

    def micro_batch(terms: GkdSpec, rows: list[int], weight: float) -> dict[str, torch.Tensor]:
        ids_BT = windows_NT[rows].long().to(device)
        positions_BT = None if positions_NT is None else positions_NT[rows].long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            losses = loss_terms(parent_model, child, ids_BT, terms, positions_BT, imitated)
        return {name: loss * (weight * len(ids_BT)) for name, loss in losses.items()}

    def mean_over(rows: Sequence[int], terms: GkdSpec) -> list[MicroBatch]:
        parts = list(micro_batches(rows, micro))
        own = group.share(parts) if group else [(part, 1) for part in parts]
        return [partial(micro_batch, terms, part, weight / len(rows)) for part, weight in own]

    def losses(step: int) -> list[MicroBatch]:
        return mean_over(batch_rows(step, batch, windows - held_back, work.seed), spec)

    watch = None
    if held_back:
        file = (checkpoints.file if checkpoints else out_dir / "training").with_name("best.safetensors")
        watched = mean_over(range(windows - held_back, windows), KL_ALONE)
        watch = Watch(watched, spec.held_back_checks, spec.patience, file)
    if threads * sum(4 * parameter.numel() for parameter in parameters.values()) > SIDE_BY_SIDE_BYTES:
        threads = 1
    started = time.monotonic()
    past = train("GKD", parameters, losses, steps, spec.optimizer, checkpoints, report, threads, group, watch)
    state = child.state_dict()
    if parent.shape.tied_embeddings:
        state.pop("lm_head.weight")
    dtype = torch_dtype(work.dtype)
    tensors = ((name, (group.gather(tensor) if group else tensor).to(dtype)) for name, tensor in state.items())
    if group and not group.leads:
        deque(tensors, maxlen=0)  # every process must take part in the gathering
    else:
        write_checkpoint(out_dir, tensors)
        write_description(parent, work.architecture, work.dtype, out_dir)
        if watch and not checkpoints:
            watch.file.unlink()
    return GkdRecord(
        architecture=work.architecture,
        curve=tuple(past.curve),
        held_back=tuple(HeldBackKl(step=step, kl_nats_per_token=kl) for step, kl in past.held_back),
        tokens=len(past.curve) * spec.batch_tokens,
        seconds=time.monotonic() - started,
    )


def loss_terms(
    parent_model: PuzzleForCausalLM,
    child: PuzzleForCausalLM,
    ids_BT: torch.Tensor,
    spec: GkdSpec,
    positions_BT: torch.Tensor | None = None,
    imitated: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Compute the weighted loss terms of one batch, each a scalar; a term of weight 0 is skipped.

    Where positions are given and start again, attention does not reach back. `imitated` are the parent's layers whose
    outputs those of the child's layers imitate; by default all.
    """
    given = {"input_ids": ids_BT, "position_ids": positions_BT, "output_hidden_states": True}
    given["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=ids_BT.device)
    with torch.no_grad():
        target = parent_model(**given)
    output = child(**given)
    terms: dict[str, torch.Tensor] = {}
    if spec.cosine_weight:
        layers = range(len(target.hidden_states)) if imitated is None else imitated
        pairs = zip([target.hidden_states[layer] for layer in layers], output.hidden_states, strict=True)
        distances = [computed_again(cosine_distance, p, c) for p, c in pairs]
        terms["cosine"] = spec.cosine_weight * torch.stack(distances).sum()
    if spec.kl_weight or spec.lm_weight:
        predicted = from_states(parent_model, parent_model.model.normalise(target.hidden_states[-1]))
        normalised_BTD = child.model.normalise(output.hidden_states[-1])
        terms |= _prediction_terms(predicted, child, normalised_BTD, ids_BT, spec)
    return terms


def _prediction_terms(
    parent: Chunk, child: PuzzleForCausalLM, normalised_BTD: torch.Tensor, ids_BT: torch.Tensor, spec: GkdSpec
) -> dict[str, torch.Tensor]:
    """The loss terms of next-token distributions."""

    def measure(parent_CV: torch.Tensor, child_CV: torch.Tensor, following_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kl = (kl_divergence(parent_CV, child_CV),) if spec.kl_weight else ()
        return (*kl, next_token_loss(child_CV, following_C)) if spec.lm_weight else kl

    values = iter(per_token(measure, parent, child, normalised_BTD, ids_BT))
    terms = {"kl": spec.kl_weight * next(values).mean()} if spec.kl_weight else {}
    return terms | ({"lm": spec.lm_weight * next(values)[:, :-1].mean()} if spec.lm_weight else {})
