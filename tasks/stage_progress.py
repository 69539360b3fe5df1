"""The progress of a long stage, with the time that is left: in the log, and as an artifact in Prefect's UI."""

import logging
import time
from collections.abc import Callable

from puzzle_core.report.units import duration_text, percent_text
from tasks.ui_artifacts import ProgressArtifact

log = logging.getLogger("puzzle")
LEAST_SECONDS = 10.0
"""Between two lines of the log, and of a stage that is shown at all."""


class StageProgress:
    """How far one stage is, from its construction on.

    The time that is left follows from how long the work since then took.
    """

    def __init__(
        self,
        stage: str,
        name: str,
        done: int = 0,
        shows_end: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The progress of a stage that starts now.

        Args:
            stage: what progresses.
            name: of what it is the progress, for instance the specification.
            done: units of work that were done before.
            shows_end: whether Prefect shows the end of a stage that took less than LEAST_SECONDS, too.
            clock: seconds from any start.
        """
        self._stage, self._artifact = stage, ProgressArtifact(stage, name)
        self._done_before, self._shows_end, self._clock = done, shows_end, clock
        self._started = self._shown = clock()

    def show(self, done: int, total: int, remark: str = "") -> None:
        """Show that `done` of `total` units are done; skipped within LEAST_SECONDS of the last time, except the end.

        Args:
            done: units of work, those done before included.
            total: all of them.
            remark: what else the line says.
        """
        now, ended = self._clock(), done >= total
        due = now - self._shown >= LEAST_SECONDS
        if not due and not (ended and (self._shows_end or self._artifact.exists)):
            return
        self._shown = now
        text = f"{done:,} of {total:,}, {percent_text(done / max(1, total))}"
        if not ended and done > self._done_before:
            left = (now - self._started) / (done - self._done_before) * (total - done)
            text += f", {duration_text(round(left))} left"
        if due:
            log.info("%s: %s%s", self._stage, text, remark and f"; {remark}")
        self._artifact.show(100 * done / max(1, total), text)
