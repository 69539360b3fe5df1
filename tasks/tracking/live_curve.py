"""The losses of a training, logged to MLflow while it runs."""

import time

from tasks.tracking.tracked_models import Values
from tasks.tracking.tracked_run import TrackedRun

SEND_SECONDS = 5.0
HELD_BACK_KL = "held_back_kl"
"""Name of the KL on held-back windows among the losses of GKD."""


class LiveCurve:
    """Collects a training's losses and sends them every SEND_SECONDS."""

    def __init__(self, run: TrackedRun, name: str):
        self._run, self._name = run, name
        self._values: Values = []
        self._sent_s = time.monotonic()

    def add(self, step: int, losses: dict[str, float], last: bool) -> None:
        """Add the losses of a step; send all that were added if it is time, or the last step."""
        self._values += [(f"{self._name}/{name}", loss, step) for name, loss in losses.items()]
        if last or time.monotonic() - self._sent_s > SEND_SECONDS:
            self._run.metrics(self._values)
            self._values, self._sent_s = [], time.monotonic()
