"""Who may use this machine when: measurements alone, everything else side by side, with a GPU for each task.

Two runs on one machine know nothing of each other, so they take turns by locks on files that all runs of a user share:
two for measurements, one for each GPU, and one for every piece of work, so that of two runs of one spec the second
waits for the first. The kernel holds the locks: they are gone with the process that had them, however it died, no
server takes part, and one costs microseconds. A measurement that waits closes the door, so that what comes later waits
behind it; GPUs are waited for in a queue, before the work and the turn.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from puzzle_core.device import gpu_names
from puzzle_core.errors import SpecError

log = logging.getLogger("puzzle")
LOOK_SECONDS = 0.05
_last = threading.local()


def place() -> Path:
    """The directory of the lock files; `PUZZLE_LOCK_DIR` names another, which containers of one machine can share."""
    return Path(os.environ.get("PUZZLE_LOCK_DIR") or Path(tempfile.gettempdir()) / f"puzzle-{os.getuid()}")


@contextlib.contextmanager
def machine_lock(alone: bool) -> Iterator[None]:
    """Wait until this machine is free, of other measurements or of everything, and keep it so.

    Args:
        alone: whether nothing else may run meanwhile.
    """
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    place().mkdir(mode=0o700, parents=True, exist_ok=True)
    with (place() / "room").open("ab") as room:
        with (place() / "door").open("ab") as door:
            _wait(door, kind, "a measurement of another task")
            _wait(room, kind, "other tasks on this machine, to measure alone" if alone else "a measurement")
        yield


@contextlib.contextmanager
def artifact_lock(work: str) -> Iterator[None]:
    """Wait until no other run on this machine is at the same work, and keep it from them.

    Args:
        work: names it, and what it is written to: equal names wait for each other.
    """
    file = place() / f"claim-{hashlib.sha256(work.encode()).hexdigest()[:32]}"
    place().mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        with file.open("ab") as claimed:
            _wait(claimed, fcntl.LOCK_EX, f"another run that is at the same work: {work}")
            if not _is_named(claimed, file):  # who had it before has removed it
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _is_named(opened: IO[bytes], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), file.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def gpus(count: int = 1) -> Iterator[list[int]]:
    """So many GPUs that no other task has, as torch numbers them; none where the machine has none.

    Raises:
        SpecError: there are fewer.
    """
    names = gpu_names()
    if names and count > len(names):
        raise SpecError(f"{count} GPUs are asked for, but this machine has {len(names)}: lower runtime.gkd_processes")
    place().mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        numbers = _take(names, count, held) if names else []
        yield numbers


def _take(names: list[str], count: int, held: contextlib.ExitStack) -> list[int]:
    """Wait in the queue until so many are free, those of the thread's last task first: its weights are there."""
    last, taken = getattr(_last, "taken", []), list[int]()
    order = sorted(range(len(names)), key=lambda number: number not in last)
    with (place() / "queue").open("ab") as queue:
        _wait(queue, fcntl.LOCK_EX, "other tasks in the queue for a GPU")
        while len(taken) < count:
            for number in order:
                if len(taken) < count and number not in taken and _is_free(names[number], held):
                    taken.append(number)
            time.sleep(LOOK_SECONDS if len(taken) < count else 0)
    _last.taken = taken
    return taken


def _is_free(name: str, held: contextlib.ExitStack) -> bool:
    """Take a GPU if nobody has it."""
    file = (place() / f"gpu-{name}").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    held.enter_context(file)
    return True


def _wait(file: IO[bytes], kind: int, what: str) -> None:
    """Take a lock; asleep in between and not in the kernel, where nothing could cancel the task."""
    told = False
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                log.info("waiting for %s", what)
                told = True
            time.sleep(LOOK_SECONDS)
