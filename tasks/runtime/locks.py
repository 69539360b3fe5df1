"""Locks between the runs of one machine: on the machine, on each GPU, and on each artifact.

Runs on one machine do not know of each other. They lock files in a directory that all runs of a user share. Ordinary
tasks hold the machine lock in shared mode, a measurement holds it in exclusive mode. A waiting measurement blocks tasks
that arrive after it, so it is not starved. Each GPU has a lock, and tasks queue for them; a task takes its GPUs before
its artifact and before the machine. Tasks of one process that go side by side share a GPU's lock. The artifact lock
makes the second of two equal runs wait for the first.

The kernel holds the locks and releases them when a process ends, however it ends. No server takes part.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from puzzle_core.device import gpu_names
from puzzle_core.errors import SpecError
from tasks.runtime.private_files import check_owned

log = logging.getLogger("puzzle")
POLL_SECONDS = 0.05
LockMode = Literal["shared", "exclusive"]
_thread = threading.local()
_sharing = threading.Lock()
_shared: dict[int, contextlib.ExitStack] = {}  # the locks of the GPUs that tasks of this process share, by number
_users: Counter[int] = Counter()


def lock_directory() -> Path:
    """The directory of the lock files; `PUZZLE_LOCK_DIR` names another, which containers of one machine can share."""
    return Path(os.environ.get("PUZZLE_LOCK_DIR") or Path(tempfile.gettempdir()) / f"puzzle-{os.getuid()}")


@contextlib.contextmanager
def machine_lock(mode: LockMode) -> Iterator[None]:
    """Wait for the machine lock, and hold it. A waiting measurement blocks tasks that arrive after it.

    Args:
        mode: "shared" for work that may run beside other work, "exclusive" for a measurement.
    """
    exclusive = mode == "exclusive"
    operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with _open("machine") as machine:
        with _open("machine-queue") as queue:
            _wait(queue, operation, "a measurement of another task")
            _wait(machine, operation, "other tasks on this machine, to measure alone" if exclusive else "a measurement")
        yield


@contextlib.contextmanager
def artifact_lock(name: str) -> Iterator[None]:
    """Wait until no other run on this machine makes the same artifact, and hold its lock.

    Args:
        name: the artifact and the store it is written to; equal names exclude each other.
    """
    name_of_file = f"artifact-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    path = lock_directory() / name_of_file
    while True:
        with _open(name_of_file) as file:
            _wait(file, fcntl.LOCK_EX, f"another run that is at the same work: {name}")
            if not _is_at(path, file):  # the previous holder has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def gpu_lock(count: int = 1) -> Iterator[list[int]]:
    """Wait for GPUs, and hold them: torch's numbers of `count` GPUs, or none where the machine has no GPU.

    Raises:
        SpecError: the machine has fewer.
    """
    names = gpu_names()
    if names and count > len(names):
        raise SpecError(f"{count} GPUs are asked for, but this machine has {len(names)}: lower runtime.gkd_processes")
    with contextlib.ExitStack() as locks:
        numbers = _wait_for_gpus(names, count, locks) if names else []
        yield numbers


@contextlib.contextmanager
def shared_gpu(most: int) -> Iterator[list[int]]:
    """Wait for a GPU and hold it together with other tasks of this process: its number, or none on a machine without.

    A new task takes a free GPU while the process shares fewer than `most`, then the one with the fewest tasks. It waits
    behind the tasks of other runs that wait for a GPU.
    """
    names = gpu_names()
    if not names:
        yield []
        return
    number = _share_gpu(names, most)
    try:
        yield [number]
    finally:
        with _sharing:
            _users[number] -= 1
            if not _users[number]:
                _shared.pop(number).close()


def _share_gpu(names: list[str], most: int) -> int:
    with _open("gpu-queue") as queue:
        _wait(queue, fcntl.LOCK_EX, "other tasks in the queue for a GPU")
        while True:
            with _sharing:
                others = [number for number in range(len(names)) if number not in _shared]
                for number in others if len(_shared) < most else ():
                    locks = contextlib.ExitStack()
                    if _try_gpu(names[number], locks):
                        _shared[number] = locks
                        break
                if _shared:
                    number = min(_shared, key=lambda number: (_users[number], number))
                    _users[number] += 1
                    return number
            time.sleep(POLL_SECONDS)


def _open(name: str) -> IO[bytes]:
    """Open a lock file, which is made where there is none.

    Raises:
        PuzzleError: the directory in the temporary one is not this user's own.
    """
    with contextlib.suppress(FileExistsError):  # a file: refused below
        lock_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.environ.get("PUZZLE_LOCK_DIR"):  # one that the user names may be shared
        check_owned(lock_directory())
    return (lock_directory() / name).open("ab")


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether this open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _wait_for_gpus(names: list[str], count: int, locks: contextlib.ExitStack) -> list[int]:
    """Wait in the queue until `count` GPUs are free; those of the thread's last task come first: weights are there."""
    last: list[int] = getattr(_thread, "gpus", [])
    taken: list[int] = []
    order = sorted(range(len(names)), key=lambda number: number not in last)
    with _open("gpu-queue") as queue:
        _wait(queue, fcntl.LOCK_EX, "other tasks in the queue for a GPU")
        while len(taken) < count:
            for number in order:
                if len(taken) < count and number not in taken and _try_gpu(names[number], locks):
                    taken.append(number)
            time.sleep(POLL_SECONDS if len(taken) < count else 0)
    _thread.gpus = taken
    return taken


def _try_gpu(name: str, locks: contextlib.ExitStack) -> bool:
    """Lock a GPU if it is free."""
    file = _open(f"gpu-{name}")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    locks.enter_context(file)
    return True


def _wait(file: IO[bytes], operation: int, holder: str) -> None:
    """Take a lock. Polls: a task that waits in the kernel could not be cancelled.

    Args:
        file: the open lock file.
        operation: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
        holder: who may hold it, for the log.
    """
    logged = False
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not logged:
                log.info("waiting for %s", holder)
                logged = True
            time.sleep(POLL_SECONDS)
