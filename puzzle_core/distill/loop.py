"""The training loop that BLD and GKD share: AdamW, warm-up and cosine, clipping, checkpoints, exact resume.

The data of a step follow from its number, and a checkpoint holds weights, both moments and the loss curve, so a
resumed training is bitwise the uninterrupted one.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puzzle_core.errors import NonFiniteError, StorageError
from puzzle_core.spec import OptimizerSpec

if TYPE_CHECKING:  # loading FSDP2 takes a second, which only those who use it should wait
    from puzzle_core.distill.distributed import ShardedGroup

log = logging.getLogger(__name__)

Parameters = dict[str, torch.nn.Parameter]
MicroBatch = Callable[[], dict[str, torch.Tensor]]


class Checkpoints(NamedTuple):
    """Where a training keeps its checkpoint, and how often it may write one."""

    file: Path
    least_seconds: float


class Progress(NamedTuple):
    """What a training reports after a step."""

    step: int
    steps: int
    loss: float
    terms: dict[str, float]


def learning_rate(step: int, steps: int, spec: OptimizerSpec) -> float:
    """Linear warm-up over `warmup_share` of the steps, then a cosine down to zero."""
    warmup = max(1, round(spec.warmup_share * steps))
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    what: str,
    parameters: Parameters,
    losses_of_step: Callable[[int], list[MicroBatch]],
    steps: int,
    spec: OptimizerSpec,
    checkpoints: Checkpoints | None = None,
    report: Callable[[Progress], None] | None = None,
    threads: int = 1,
    together: "ShardedGroup | None" = None,
) -> list[dict[str, float]]:
    """Train `parameters` in place.

    Args:
        what: how error messages name this training.
        losses_of_step: the micro-batches of a step, each a function that computes its weighted loss terms; the sum of
            all terms is minimised.
        checkpoints: none for a training that is too short to be worth one.
        report: called after every step.
        threads: how many micro-batches run side by side, one thread each; gradients are added in their order, so
            the result is bitwise the same for any number.
        together: the processes that share this training, if any; all of them call this, each with its micro-batches.

    Returns:
        The loss terms of every step, `loss` being their sum.

    Raises:
        NonFiniteError: a loss is NaN or infinite; names `what` and the step.
        StorageError: the checkpoint to resume from cannot be read, or a new one cannot be written.
    """
    optimizer = _adamw(parameters, spec)
    curve = _resume(checkpoints, parameters, optimizer, together)
    saved = time.monotonic()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(len(curve), steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, spec)
            if together:
                terms = _accumulate_together(losses_of_step(step), together)
            else:
                terms = _accumulate(parameters, losses_of_step(step), threads, pool.map if threads > 1 else map)
            total = sum(terms.values())
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"{what} diverged: its loss is {total} at step {step + 1} of {steps}; lower the learning rate "
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
                if together.agreed(due) if together else due:
                    _save(checkpoints.file, parameters, optimizer, curve, together)
                    saved = time.monotonic()
    return curve


def _accumulate(
    parameters: Parameters, micro_batches: list[MicroBatch], at_once: int, each: Callable[..., Iterable[Any]]
) -> dict[str, float]:
    """Set all gradients to their sum over micro-batches, `at_once` of them at a time; return the summed loss terms."""
    wanted, terms = list(parameters.values()), dict[str, float]()

    def gradients(micro_batch: MicroBatch) -> tuple[dict[str, float], tuple[torch.Tensor | None, ...]]:
        losses = micro_batch()
        found = torch.autograd.grad(torch.stack(list(losses.values())).sum(), wanted, allow_unused=True)
        return {name: loss.item() for name, loss in losses.items()}, found

    for start in range(0, len(micro_batches), at_once):
        for losses, found in each(gradients, micro_batches[start : start + at_once]):
            for parameter, gradient in zip(wanted, found, strict=True):
                if gradient is not None:  # else no loss term reaches it: it must not decay either
                    known = parameter.grad  # cloned, since autograd may give two parameters one tensor, or a view
                    parameter.grad = gradient.clone() if known is None else known.add_(gradient)
            for name, loss in losses.items():
                terms[name] = terms.get(name, 0.0) + loss
    return terms


def _accumulate_together(micro_batches: list[MicroBatch], together: "ShardedGroup") -> dict[str, float]:
    """As above, over the micro-batches of all processes; FSDP2 sums the gradients as it goes through the blocks."""
    terms = dict[str, torch.Tensor]()
    for micro_batch in micro_batches:
        losses = micro_batch()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for name, loss in losses.items():
            terms[name] = terms.get(name, 0.0) + loss.detach()
    return together.sum(terms)


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
    together: "ShardedGroup | None",
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if parameter in optimizer.state:  # else no loss term has ever reached it, and it is as it was
            parts = {"weight": parameter.detach()} | optimizer.state[parameter]
            for key, part in parts.items():
                found = together.whole(part) if together else part
                if not together or together.leads:
                    tensors[f"{name}/{key}"] = found.cpu()
    if together and not together.leads:
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
    checkpoints: Checkpoints | None, parameters: Parameters, optimizer: Any, together: "ShardedGroup | None"
) -> list[dict[str, float]]:
    if not checkpoints or not checkpoints.file.exists():
        return []
    try:
        with safe_open(checkpoints.file, framework="pt") as file, torch.no_grad():
            for saved in file.keys():  # noqa: SIM118
                name, _, key = saved.rpartition("/")
                parameter, found = parameters[name], file.get_tensor(saved)
                found = found.to(parameter.device)
                if together and found.dim():
                    found = together.part_of(found, parameter)
                if key == "weight":
                    parameter.copy_(found)
                else:
                    optimizer.state[parameter][key] = found
            curve: list[dict[str, float]] = json.loads(file.metadata()["curve"])
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"checkpoint {checkpoints.file} is not readable ({error}): delete it to start this training over"
        ) from error
    log.info("resuming at step %d from %s", len(curve) + 1, checkpoints.file)
    return curve


def micro_batches(rows: slice | list[int], windows: int) -> Iterator[slice | list[int]]:
    """Cut the rows of a batch into parts of at most `windows` windows."""
    if isinstance(rows, slice):
        yield from (slice(start, min(start + windows, rows.stop)) for start in range(rows.start, rows.stop, windows))
    else:
        yield from (rows[start : start + windows] for start in range(0, len(rows), windows))
