"""Records on their way to a tracking server: sent in order by a thread of their own, so that no run waits for them.

Where the server does not answer, records wait and are sent once it does, and the runs whose records came late are told.
A record that a server which answers does not take is dropped, and said.
"""

import functools
import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

log = logging.getLogger("puzzle")
RETRY_SECONDS = 15.0
PATIENCE_SECONDS = 15.0
MOMENT_SECONDS = 1.0
MOST_WAITING = 20_000


class Waiting(NamedTuple):
    """A record of a run, and how to send it."""

    run: str
    send: Callable[[], Any]


class Gap(NamedTuple):
    """A time in which the server did not answer (epoch seconds), and how many records of a run waited for its end."""

    since_s: float
    until_s: float
    records: int


class Outbox:
    """What one process has to say to one server."""

    def __init__(self, where: str, ask: Callable[[], Any], mark: Callable[[str, Gap], None]):
        """An empty one.

        Args:
            where: the server, as messages name it.
            ask: a cheap request; raises where the server does not answer.
            mark: notes a gap in a run.
        """
        self.where, self._ask, self._mark = without_credentials(where), ask, mark
        self._waiting = deque[Waiting]()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._down_since_s: float | None = None
        self._hurry, self._stuck, self._sent, self._overflow = False, False, 0, 0

    def put(self, run: str, send: Callable[[], Any]) -> None:
        """Have a record of a run sent; comes back at once."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._overflow += 1
                return
            self._waiting.append(Waiting(run, send))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> bool:
        """Wait until everything is sent, or it is clear that the server does not answer now.

        Returns:
            Whether everything was sent.
        """
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while self._waiting and self._hurry:
                sent = self._sent
                moved = functools.partial(lambda before: self._sent != before or not self._hurry, sent)
                if not self._changed.wait_for(moved, PATIENCE_SECONDS):
                    log.warning("MLflow at %s gives no answer, the run does not wait for it", self.where)
                    self._stuck = True
                    break
            self._hurry = False
            return not self._waiting

    def drop(self, run: str) -> int:
        """Drop what waits of a run.

        Returns:
            How many records that were.
        """
        with self._changed:
            left = [waiting for waiting in self._waiting if waiting.run != run]
            dropped = len(self._waiting) - len(left)
            self._waiting = deque(left)
            return dropped

    @property
    def answers(self) -> bool:
        """Whether the server gave an answer when it was asked last, so that waiting for it is worth while."""
        return self._down_since_s is None and not self._stuck

    @property
    def down_since_s(self) -> float | None:
        """Since when the server has not answered (epoch seconds); none where it does."""
        return self._down_since_s

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                first = self._waiting[0]
            trouble = _try(first.send)
            if trouble and not _try(self._ask):  # the server is there: was it a moment's trouble?
                time.sleep(MOMENT_SECONDS)
                trouble = _try(first.send)
            if trouble and _try(self._ask):
                self._pause(trouble)
            else:
                if trouble:
                    said = without_credentials(str(trouble))
                    log.warning("MLflow at %s did not take a record, the run goes on without: %s", self.where, said)
                self._done(first)

    def _pause(self, trouble: Exception) -> None:
        """Wait until it is worth another try: for a while, or until somebody waits for the outcome."""
        with self._changed:
            if self._down_since_s is None:
                self._down_since_s = time.time()
                said = without_credentials(str(trouble))
                log.warning("MLflow at %s cannot be reached, the run goes on without it: %s", self.where, said)
            self._hurry = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._hurry, RETRY_SECONDS)

    def _done(self, first: Waiting) -> None:
        with self._changed:
            late = Counter(waiting.run for waiting in self._waiting)
            if self._waiting and self._waiting[0] is first:  # it was not given up meanwhile
                self._waiting.popleft()
            self._sent, self._stuck = self._sent + 1, False
            if self._down_since_s is not None:
                log.warning("MLflow at %s answers again: %d records are sent now", self.where, sum(late.values()))
                if self._overflow:
                    log.warning("%d more were too many to keep", self._overflow)
                for run, records in late.items():
                    gap = Gap(self._down_since_s, time.time(), records)
                    self._waiting.append(Waiting(run, functools.partial(self._mark, run, gap)))
                self._down_since_s, self._overflow = None, 0
            self._changed.notify_all()


def without_credentials(text: str) -> str:
    """A text whose addresses name no user and no password."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def _try(act: Callable[[], Any]) -> Exception | None:
    """What went wrong; errors of servers, databases and disks have no common base."""
    try:
        act()
    except Exception as error:
        return error
    return None
