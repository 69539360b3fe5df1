"""The outbox: a thread sends records to a tracking server in order, so that no run waits for the server.

While the server does not answer, records wait; they are sent once it answers again, and the gap is noted in the runs
whose records were late. A record that the server answers but refuses is dropped, and logged.
"""

import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from puzzle_core.credentials import redacted

log = logging.getLogger("puzzle")
Request = Callable[[], object]
RETRY_SECONDS = 15.0
"""Between two tries while the server does not answer."""
FLUSH_SECONDS = 15.0
"""How long `flush` waits for the next record to be sent."""
SECOND_TRY_SECONDS = 1.0
MOST_WAITING = 20_000


class QueuedRecord(NamedTuple):
    """A record of a run (by its token), and the request that sends it."""

    run: str
    send: Request


class Gap(NamedTuple):
    """A time in which the server did not answer (epoch seconds), and how many records of a run waited meanwhile."""

    since_s: float
    until_s: float
    records: int


class Outbox:
    """The records that one process sends to one server."""

    def __init__(self, where: str, check: Request, note_gap: Callable[[str, Gap], None]):
        """An empty outbox.

        Args:
            where: the server, as messages name it.
            check: a cheap request; raises where the server does not answer.
            note_gap: notes a gap in a run.
        """
        self.where, self._check, self._note_gap = redacted(where), check, note_gap
        self._queue = deque[QueuedRecord]()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._down_since_s: float | None = None
        self._flushing, self._stuck, self._sent, self._overflow = False, False, 0, 0
        self._refused = Counter[str]()

    def put(self, run: str, send: Request) -> None:
        """Queue a record of a run; returns at once."""
        with self._changed:
            if len(self._queue) >= MOST_WAITING:
                self._overflow += 1
                self._refused[run] += 1
                return
            self._queue.append(QueuedRecord(run, send))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._send_records, name="tracking", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> bool:
        """Wait until everything is sent, or until the server proves not to answer.

        Returns:
            Whether everything was sent.
        """
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            while self._queue and self._flushing:
                sent = self._sent
                moved = functools.partial(lambda before: self._sent != before or not self._flushing, sent)
                if not self._changed.wait_for(moved, FLUSH_SECONDS):
                    log.warning("MLflow at %s gives no answer, the run does not wait for it", self.where)
                    self._stuck = True
                    break
            self._flushing = False
            return not self._queue

    def drop(self, run: str) -> int:
        """Drop the queued records of a run.

        Returns:
            Their number.
        """
        with self._changed:
            kept = [record for record in self._queue if record.run != run]
            dropped = len(self._queue) - len(kept)
            self._queue = deque(kept)
            return dropped

    def refused(self, run: str) -> int:
        """How many records of a run the server did not take, or were dropped because the outbox was full."""
        return self._refused[run]

    @property
    def answers(self) -> bool:
        """Whether the server answered the last request, so that it is worth waiting for."""
        return self._down_since_s is None and not self._stuck

    @property
    def down_since_s(self) -> float | None:
        """Since when the server has not answered (epoch seconds); none where it does."""
        return self._down_since_s

    def _send_records(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                first = self._queue[0]
            error = _try(first.send)
            if error and not _try(self._check):  # the server answers: the error may have passed
                time.sleep(SECOND_TRY_SECONDS)
                error = _try(first.send)
            if error and _try(self._check):
                self._pause(error)
            else:
                if error:
                    message = redacted(str(error))
                    log.warning("MLflow at %s did not take a record, the run goes on without: %s", self.where, message)
                    self._refused[first.run] += 1
                self._done(first)

    def _pause(self, error: Exception) -> None:
        """Wait before the next try: RETRY_SECONDS, or until `flush` is called."""
        with self._changed:
            if self._down_since_s is None:
                self._down_since_s = time.time()
                message = redacted(str(error))
                log.warning("MLflow at %s cannot be reached, the run goes on without it: %s", self.where, message)
            self._flushing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._flushing, RETRY_SECONDS)

    def _done(self, first: QueuedRecord) -> None:
        """Remove a record that was sent or refused; after an outage, queue a note of the gap for every run."""
        with self._changed:
            late = Counter(record.run for record in self._queue)
            if self._queue and self._queue[0] is first:  # it was not dropped meanwhile
                self._queue.popleft()
            self._sent, self._stuck = self._sent + 1, False
            if self._down_since_s is not None:
                log.warning("MLflow at %s answers again: %d records are sent now", self.where, sum(late.values()))
                if self._overflow:
                    log.warning("%d more records were dropped: the outbox was full", self._overflow)
                for run, records in late.items():
                    gap = Gap(self._down_since_s, time.time(), records)
                    self._queue.append(QueuedRecord(run, functools.partial(self._note_gap, run, gap)))
                self._down_since_s, self._overflow = None, 0
            self._changed.notify_all()


def _try(request: Request) -> Exception | None:
    """Send a request; return its error. Errors of servers, databases and disks have no common base class."""
    try:
        request()
    except Exception as error:
        return error
    return None
