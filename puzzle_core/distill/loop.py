"""The training loop that BLD and GKD share: AdamW, warm-up and cosine, clipping, checkpoints, exact resume.

The number of a step determines its data, so a training resumes exactly from its checkpoint (training_checkpoint.py).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch

from puzzle_core.distill.held_back import Watch, add, best
from puzzle_core.distill.training_checkpoint import (
    Checkpoints,
    Parameters,
    Past,
    read_weights,
    resume,
    save,
    write_weights,
)
from puzzle_core.errors import BudgetError, NonFiniteError
from puzzle_core.spec import OptimizerSpec

if TYPE_CHECKING:  # the import of FSDP2 takes a second; only its users pay for it
    from puzzle_core.distill.distributed import ShardedGroup

MicroBatch = Callable[[], dict[str, torch.Tensor]]


OVER_BUDGET = (
    "the run has computed for as long as runtime.budget allows. Finished work is in the store, and trainings have left "
    "their checkpoints: raise runtime.budget.hours, or run again, to go on from there"
)


class Progress(NamedTuple):
    """State of a training after a step; `steps` is `step` where it stops early.

    `held_back` is the loss on held-back windows where it was measured.
    """

    step: int
    steps: int
    loss: float
    terms: dict[str, float]
    held_back: float | None = None


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
    watch: Watch | None = None,
) -> Past:
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
        watch: what is measured on held-back windows, and when. At the end, `parameters` are the best of those that
            were measured.

    Returns:
        The loss terms of every step (`loss` is their sum), and the losses on held-back windows.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the message names `label` and the step.
        StorageError: the checkpoint to resume from cannot be read, or a new one cannot be written.
        BudgetError: `checkpoints.stop` said so; the checkpoint is written.
    """
    optimizer = _adamw(parameters, spec)
    past = resume(checkpoints, parameters, optimizer, group)
    saved = time.monotonic()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def check(watch: Watch, done: int) -> float:
            loss = _measure(watch.micro_batches, threads, pool, group)
            if add(past.held_back, label, done, loss) and done < steps:
                write_weights(watch.file, parameters, group)
            return loss

        if watch:
            watch.check_file(past.held_back)
            _ = past.held_back or check(watch, done=0)
        for step in range(len(past.curve), steps):
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
            _update(parameters, optimizer, spec, learning_rate(step, steps, spec))
            past.curve.append({"loss": total, **terms} if len(terms) > 1 else {"loss": total})
            measured = check(watch, step + 1) if watch and watch.due(step + 1, steps) else None
            stops = watch is not None and watch.stops(past.held_back)
            if report:
                report(Progress(step + 1, step + 1 if stops else steps, total, terms, measured))
            if stops:
                break
            if checkpoints and step + 1 < steps:
                over = checkpoints.stop is not None and checkpoints.stop()
                due = over or time.monotonic() - saved >= checkpoints.least_seconds
                if group.leader_value(due) if group else due:
                    save(checkpoints.file, parameters, optimizer, past, group)
                    saved = time.monotonic()
                if over:
                    raise BudgetError(OVER_BUDGET)
    if watch and best(past.held_back)[0] < len(past.curve):
        read_weights(watch.file, parameters, group)
    return past


def _update(parameters: Parameters, optimizer: torch.optim.Optimizer, spec: OptimizerSpec, rate: float) -> None:
    """Change the parameters by their gradients, and drop these."""
    for parameter_group in optimizer.param_groups:
        parameter_group["lr"] = rate
    torch.nn.utils.clip_grad_norm_(parameters.values(), spec.gradient_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _measure(
    micro_batches: list[MicroBatch], parallel: int, pool: ThreadPoolExecutor, group: "ShardedGroup | None"
) -> float:
    """The sum of all loss terms, without gradients."""

    @torch.no_grad()
    def compute(micro_batch: MicroBatch) -> torch.Tensor:
        return torch.stack(list(micro_batch().values())).double().sum()

    losses = (pool.map if parallel > 1 else map)(compute, micro_batches)
    total = torch.stack(list(losses)).sum()
    return group.sum({"loss": total})["loss"] if group else total.item()


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
            add_losses(_backward(micro_batch))
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
        for name, loss in _backward(micro_batch).items():
            terms[name] = terms.get(name, 0.0) + loss
    return group.sum(terms)


def _backward(micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Add a micro-batch's gradients to those of the parameters in place; return its loss terms."""
    losses = micro_batch()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {name: loss.detach() for name, loss in losses.items()}


def _adamw(parameters: Parameters, spec: OptimizerSpec) -> torch.optim.AdamW:
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=spec.betas, fused=True)


def micro_batches(rows: Sequence[int], windows: int) -> Iterator[list[int]]:
    """Split the rows of a batch into micro-batches of at most `windows` windows."""
    return (list(rows[start : start + windows]) for start in range(0, len(rows), windows))
