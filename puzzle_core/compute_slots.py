"""At most so many threads of a process compute on a device at a time.

More tasks than that may be under way, for instance all variants of a layer, so that they share what they read. A task
gives its slot up while it waits for others. The oldest work goes first.
"""

import itertools
import threading
import time
from collections import defaultdict
from weakref import WeakSet

POLL_SECONDS = 0.05
"""A thread that waits looks up this often, since one that waits in the kernel could not be cancelled."""

_thread = threading.local()
_changed = threading.Condition()
_tickets = itertools.count()
_computing: dict[str, "WeakSet[ComputeSlot]"] = defaultdict(WeakSet)
_waiting: dict[str, set[tuple[int, ...]]] = defaultdict(set)


class ComputeSlot:
    """One thread's slot on a device, taken and given up any number of times. `held_s` is the time that it was held."""

    def __init__(self, device: str, most: int):
        """Of a device where at most `most` threads of this process compute."""
        self._device, self._most = device, most
        self._since: float | None = None
        self.held_s = 0.0

    def take(self, *order: int) -> None:
        """Wait until a slot is free and nobody of a lower order waits for one. A slot that is held stays held."""
        if self._since is not None:
            return
        ticket, waiting, computing = (*order, next(_tickets)), _waiting[self._device], _computing[self._device]
        with _changed:
            waiting.add(ticket)
            try:
                while len(computing) >= self._most or min(waiting) != ticket:
                    _changed.wait(POLL_SECONDS)
                computing.add(self)
                self._since = _thread.since = time.monotonic()
            finally:
                waiting.remove(ticket)
                _changed.notify_all()

    def __enter__(self) -> "ComputeSlot":
        """Take the slot, before those who wait within a sequence of items."""
        self.take(-1)
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Let another thread compute."""
        with _changed:
            _computing[self._device].discard(self)
            _changed.notify_all()
        if self._since is not None:
            held_s = time.monotonic() - self._since
            self.held_s += held_s
            _thread.held_s, _thread.since = getattr(_thread, "held_s", 0.0) + held_s, None
        self._since = None


def held_seconds() -> float:
    """How long the calling thread has held a slot in all, up to now."""
    held_s: float = getattr(_thread, "held_s", 0.0)
    since: float | None = getattr(_thread, "since", None)
    return held_s if since is None else held_s + time.monotonic() - since
