"""The training loop that BLD and GKD share: AdamW, warm-up and cosine, clipping, checkpoints, exact resume.

The number of a step determines its data, and a checkpoint holds the weights, both moments and the loss curve. A resumed
training therefore gives bitwise the result of an uninterrupted one.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puzzle_core.errors import NonFiniteError, StorageError
from puzzle_core.spec import OptimizerSpec

if TYPE_CHECKING:  # the import of FSDP2 takes a second; only its users pay for it
    from puzzle_core.distill.distributed import ShardedGroup

log = logging.getLogger(__name__)

Parameters = dict[str, torch.nn.Parameter]
MicroBatch = Callable[[], dict[str, torch.Tensor]]


class Checkpoints(NamedTuple):
    """File of a training's checkpoint, and the least time in seconds between two writes."""

    file: Path
    least_seconds: float


class Progress(NamedTuple):
    """State of a training after a step."""

    step: int
    steps: int
    loss: float
    terms: dict[str, float]


def learning_rate(step: int, steps: int, spec: OptimizerSpec) -> float:
    """Learning rate of a step: linear warm-up over `warmup_share` of the steps, then a cosine decay to zero."""
    warmup = max(1, round(spec.warmup_share * steps))
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    label: str,
    parameters: Parameters,
    losses_of_step: Callable[[int], list[MicroBatch]],
    steps: int,
    spec: OptimizerSpec,
    checkpoints: Checkpoints | None = None,
    report: Callable[[Progress], None] | None = None,
    threads: int = 1,
    group: "ShardedGroup | None" = None,
) -> list[dict[str, float]]:
    """Train `parameters` in place.

    Args:
        label: name of this training in error messages.
        losses_of_step: returns the micro-batches of a step, each a function that computes its weighted loss terms; the
            sum of all terms is minimised.
        checkpoints: file and interval of the checkpoint; None writes none.
        report: called after every step.
        threads: micro-batches that run at the same time, one thread each. Gradients are added in the order of the
            micro-batches, so the result is bitwise the same for any number of threads.
        group: the processes that share this training, if any. All of them call this function, each with its own
            micro-batches.

    Returns:
        The loss terms of every step; `loss` is their sum.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the message names `label` and the step.
        StorageError: the checkpoint to resume from cannot be read, or a new one cannot be written.
    """
    optimizer = _adamw(parameters, spec)
    curve = _resume(checkpoints, parameters, optimizer, group)
    saved = time.monotonic()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(len(curve), steps):
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = learning_rate(step, steps, spec)
            if group:
                terms = _accumulate_sharded(losses_of_step(step), group)
            else:
                terms = _accumulate(parameters, losses_of_step(step), threads, pool)
            total = sum(terms.values())
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"{label} diverged: its loss is {total} at step {step + 1} of {steps}; lower the learning rate "
                    f"(now {spec.learning_rate}) or the gradient clip (now {spec.gradient_clip})"
                )
            torch.nn.utils.clip_grad_norm_(parameters.values(), spec.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.append({"loss": total, **terms} if len(terms) > 1 else {"loss": total})
            if report:
                report(Progress(step + 1, steps, total, terms))
            if checkpoints and step + 1 < steps:
                due = time.monotonic() - saved >= checkpoints.least_seconds
                if group.leader_value(due) if group else due:
                    _save(checkpoints.file, parameters, optimizer, curve, group)
                    saved = time.monotonic()
    return curve


def _accumulate(
    parameters: Parameters, micro_batches: list[MicroBatch], parallel: int, pool: ThreadPoolExecutor
) -> dict[str, float]:
    """Set all gradients to their sum over micro-batches, `parallel` of them at a time; return the summed loss terms.

    One at a time adds to the gradients in place. More at a time need a set of gradients each, which are added in order.
    """
    trained, terms = list(parameters.values()), dict[str, float]()

    def add_losses(losses: dict[str, torch.Tensor]) -> None:
        for name, loss in losses.items():
            terms[name] = terms.get(name, 0.0) + loss.item()

    def compute(micro_batch: MicroBatch) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor | None, ...]]:
        losses = micro_batch()
        gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), trained, allow_unused=True)
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    if parallel == 1:
        for micro_batch in micro_batches:
            losses = micro_batch()
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            add_losses(losses)
        return terms
    for start in range(0, len(micro_batches), parallel):
        for losses, gradients in pool.map(compute, micro_batches[start : start + parallel]):
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:  # a parameter that no loss term reaches must not decay
                    total = parameter.grad  # cloned below: autograd may return one tensor for two parameters, or a view
                    parameter.grad = gradient.clone() if total is None else total.add_(gradient)
            add_losses(losses)
    return terms


def _accumulate_sharded(micro_batches: list[MicroBatch], group: "ShardedGroup") -> dict[str, float]:
    """Like `_accumulate`, over the micro-batches of all processes; FSDP2 sums the gradients in the backward pass."""
    terms = dict[str, torch.Tensor]()
    for micro_batch in micro_batches:
        losses = micro_batch()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for name, loss in losses.items():
            terms[name] = terms.get(name, 0.0) + loss.detach()
    return group.sum(terms)


def _adamw(parameters: Parameters, spec: OptimizerSpec) -> torch.optim.AdamW:
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=spec.betas, fused=True)


def _save(
    file: Path,
    parameters: Parameters,
    optimizer: torch.optim.AdamW,
    curve: list[dict[str, float]],
    group: "ShardedGroup | None",
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if parameter in optimizer.state:  # a parameter without state is unchanged: no loss term has reached it
            entries = {"weight": parameter.detach()} | optimizer.state[parameter]
            for key, entry in entries.items():
                tensor = group.gather(entry) if group else entry
                if not group or group.leads:
                    tensors[f"{name}/{key}"] = tensor.cpu()
    if group and not group.leads:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"curve": json.dumps(curve)})
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write the checkpoint {file} ({error}): free some space, or set runtime.scratch to a larger disk"
        ) from error
    temporary.replace(file)


def _resume(
    checkpoints: Checkpoints | None, parameters: Parameters, optimizer: Any, group: "ShardedGroup | None"
) -> list[dict[str, float]]:
    if not checkpoints or not checkpoints.file.exists():
        return []
    try:
        with safe_open(checkpoints.file, framework="pt") as file, torch.no_grad():
            for saved in file.keys():  # noqa: SIM118
                name, _, key = saved.rpartition("/")
                parameter, tensor = parameters[name], file.get_tensor(saved)
                tensor = tensor.to(parameter.device)
                if group and tensor.dim():
                    tensor = group.shard(tensor, parameter)
                if key == "weight":
                    parameter.copy_(tensor)
                else:
                    optimizer.state[parameter][key] = tensor
            curve: list[dict[str, float]] = json.loads(file.metadata()["curve"])
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"checkpoint {checkpoints.file} is not readable ({error}): delete it to start this training over"
        ) from error
    log.info("resuming at step %d from %s", len(curve) + 1, checkpoints.file)
    return curve


def micro_batches(rows: Sequence[int], windows: int) -> Iterator[list[int]]:
    """Split the rows of a batch into micro-batches of at most `windows` windows."""
    return (list(rows[start : start + windows]) for start in range(0, len(rows), windows))
