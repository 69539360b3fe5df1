"""Loss on windows that a training does not see: measured a few times, so that the best weights are kept.

A training may then stop early. The best weights lie in a file beside the checkpoint, not in memory.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from puzzle_core.distill.training_checkpoint import HeldBack
from puzzle_core.errors import NonFiniteError, StorageError


class Watch(NamedTuple):
    """What a training measures on held-back windows, when, and when it stops early.

    Args:
        micro_batches: functions that compute loss terms of the held-back windows; the loss is the sum of all.
        checks: measurements during the training, at even distances; the last one is at its end. One more is made
            before the first step.
        patience: checks in a row without a lower loss after which the training stops; None: it goes on to its end.
        file: where the best weights are kept until the end; like the checkpoint, it outlives a stopped training.
    """

    micro_batches: list[Callable[[], dict[str, torch.Tensor]]]
    checks: int
    patience: int | None
    file: Path

    def due(self, done: int, steps: int) -> bool:
        """Whether the loss is measured after `done` of `steps` steps."""
        return done == 0 or done * self.checks // steps > (done - 1) * self.checks // steps

    def stops(self, points: HeldBack) -> bool:
        """Whether the last `patience` measurements were all no better than the best one before them."""
        return self.patience is not None and points.index(best(points)) < len(points) - self.patience

    def check_file(self, points: HeldBack) -> None:
        """Check that a training that goes on finds the best weights of its past.

        Raises:
            StorageError: the file is missing.
        """
        if points and not self.file.exists():
            raise StorageError(
                f"the best weights {self.file} of this training are missing: delete the checkpoint beside them to "
                "start this training over"
            )


def best(points: HeldBack) -> tuple[int, float]:
    """The measurement with the lowest loss, the first of equal ones."""
    return min(points, key=lambda point: point[1])


def add(points: HeldBack, label: str, done: int, loss: float) -> bool:
    """Add the loss after `done` steps, and tell whether it is the lowest so far.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"{label} diverged: its loss on held-back windows is {loss} after {done} steps; lower the learning rate"
        )
    points.append((done, loss))
    return best(points) == points[-1]
