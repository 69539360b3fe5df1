"""Files of an unfinished training: the checkpoint that it resumes from, and the best weights so far.

A checkpoint holds the weights, both moments, the loss curve and what was measured on held-back windows. A resumed
training therefore gives bitwise the result of an uninterrupted one.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puzzle_core.errors import StorageError

if TYPE_CHECKING:  # the import of FSDP2 takes a second; only its users pay for it
    from puzzle_core.distill.distributed import ShardedGroup

log = logging.getLogger(__name__)

Parameters = dict[str, torch.nn.Parameter]
HeldBack = list[tuple[int, float]]
"""Number of steps done, and the loss on held-back windows after them."""


class Checkpoints(NamedTuple):
    """File of a training's checkpoint, and the least time in seconds between two writes.

    `stop` is asked after every step: where it is true, the training writes a checkpoint and ends with a BudgetError.
    """

    file: Path
    least_seconds: float
    stop: Callable[[], bool] | None = None


class Past(NamedTuple):
    """What a training has done: the loss terms of every step, and what was measured on held-back windows."""

    curve: list[dict[str, float]]
    held_back: HeldBack


def save(
    file: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, past: Past, group: "ShardedGroup | None"
) -> None:
    """Write a checkpoint atomically; all processes of a group must call this, and rank 0 writes.

    Raises:
        StorageError: the checkpoint cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if parameter in optimizer.state:  # a parameter without state is unchanged: no loss term has reached it
            entries = {"weight": parameter.detach()} | optimizer.state[parameter]
            tensors |= _gathered(((f"{name}/{key}", entry) for key, entry in entries.items()), group)
    if not group or group.leads:
        _write(file, tensors, {name: json.dumps(part) for name, part in past._asdict().items()})


def resume(
    checkpoints: Checkpoints | None,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    group: "ShardedGroup | None",
) -> Past:
    """Set parameters and optimizer to the checkpoint's, if there is one, and return what had been done.

    Raises:
        StorageError: the checkpoint cannot be read.
    """
    if not checkpoints or not checkpoints.file.exists():
        return Past([], [])
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
            curve, held_back = (json.loads(file.metadata()[name]) for name in Past._fields)
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"checkpoint {checkpoints.file} is not readable ({error}): delete it to start this training over"
        ) from error
    log.info("resuming at step %d from %s", len(curve) + 1, checkpoints.file)
    return Past(curve, [(step, loss) for step, loss in held_back])


def write_weights(file: Path, parameters: Parameters, group: "ShardedGroup | None") -> None:
    """Write the parameters alone, atomically; all processes of a group must call this, and rank 0 writes.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors = _gathered(((name, parameter.detach()) for name, parameter in parameters.items()), group)
    if not group or group.leads:
        _write(file, tensors, {})


@torch.no_grad()
def read_weights(file: Path, parameters: Parameters, group: "ShardedGroup | None") -> None:
    """Set the parameters to those that `write_weights` wrote.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            for name, parameter in parameters.items():
                tensor = opened.get_tensor(name).to(parameter.device)
                parameter.copy_(group.shard(tensor, parameter) if group else tensor)
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"the best weights {file} are not readable ({error}): delete the directory {file.parent} to start this "
            "training over"
        ) from error


def _gathered(tensors: Iterator[tuple[str, torch.Tensor]], group: "ShardedGroup | None") -> dict[str, torch.Tensor]:
    """The whole tensors in the CPU's memory: of rank 0 where a group has shards, and nothing elsewhere."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        whole = group.gather(tensor) if group else tensor
        if not group or group.leads:
            found[name] = whole.cpu()
    return found


def _write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write the checkpoint {file} ({error}): free some space, or set runtime.scratch to a larger disk"
        ) from error
    temporary.replace(file)
