"""Local copies of a bucket's artifacts, on a disk with a limit: the least recently used go first.

An entry is a directory, `<cache>/<key>/`. Who reads it holds a shared lock on it, so no process, this one or another,
can evict it meanwhile; the kernel drops the locks of a process that dies.
"""

import contextlib
import contextvars
import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("puzzle")
ROOM_LEFT = 0.1
"""What an eviction leaves free beside what is needed, as a share of the limit: not every download should evict."""


class _Entry(NamedTuple):
    used_ns: int
    size_bytes: int
    directory: Path


_held: contextvars.ContextVar[dict[Path, int] | None] = contextvars.ContextVar("held", default=None)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Entries that are held inside stay until the end of the block; those held outside any, as long as the process.

    A block, or a function that it decorates, holds for the thread or task that entered it; blocks nest.
    """
    held: dict[Path, int] = {}
    token = _held.set(held)
    try:
        yield
    finally:
        _held.reset(token)
        for handle in held.values():
            os.close(handle)


class Cache:
    """Entries of at most `limit_bytes` together, but for what is being read."""

    def __init__(self, directory: Path, limit_bytes: float):
        self.directory, self.limit_bytes = directory, limit_bytes
        self._held_for_good: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._counted_bytes = float("inf")  # of all entries: counted, and what this process added since
        self._added_bytes = 0.0

    def hold(self, key: str) -> Path:
        """The directory of an entry, made where there is none, which nobody evicts while it is held."""
        directory, held = self.directory / key, _held.get()
        held = self._held_for_good if held is None else held
        with self._lock:
            if directory not in held or not directory.is_dir():
                if directory in held:
                    os.close(held.pop(directory))
                held[directory] = _hold(directory)
        with contextlib.suppress(OSError):
            os.utime(directory)
        return directory

    @contextlib.contextmanager
    def room_for(self, file: Path, size_bytes: int) -> Iterator[Path]:
        """A new file of this size beside `file`, to be renamed to it once it is good; removed otherwise."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            with self._lock:
                self._make_room(size_bytes)
                with partial.open("xb") as out:
                    out.truncate(size_bytes)
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def adopt(self, key: str, staged: Path, place: str) -> None:
        """Keep files that were published as an entry's, so that nobody here has to fetch them."""
        with self._lock, contextlib.suppress(OSError):
            size_bytes = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
            if size_bytes > self.limit_bytes * (1 - ROOM_LEFT):
                return
            self._make_room(size_bytes)
            handle = _hold(self.directory / key)
            try:
                staged.rename(self.directory / key / place)
            finally:
                os.close(handle)

    def drop(self, key: str) -> None:
        """Forget an entry; who reads it keeps what it has opened."""
        shutil.rmtree(self.directory / key, ignore_errors=True)

    def _make_room(self, size_bytes: int) -> None:
        """Evict until so many bytes fit; counts again now and then, for others add too."""
        self._counted_bytes += size_bytes
        self._added_bytes += size_bytes
        if self._counted_bytes <= self.limit_bytes and self._added_bytes <= self.limit_bytes * ROOM_LEFT:
            return
        entries = sorted(self._entries())
        total = sum(entry.size_bytes for entry in entries) + size_bytes
        if total > self.limit_bytes:
            for entry in entries:
                if total <= self.limit_bytes * (1 - ROOM_LEFT):
                    break
                if _evict(entry.directory):
                    total -= entry.size_bytes
            if total > self.limit_bytes:
                log.warning(
                    "%s holds %.0f MiB, more than runtime.cache_size: all of it is being read",
                    self.directory,
                    total / 2**20,
                )
        self._counted_bytes, self._added_bytes = total, 0.0

    def _entries(self) -> Iterator[_Entry]:
        for directory in self.directory.glob("[!.]*/v*/*"):
            with contextlib.suppress(FileNotFoundError):
                used = directory.stat().st_mtime_ns
                yield _Entry(used, sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()), directory)


def _hold(directory: Path) -> int:
    """A handle with a shared lock on a directory that is there under its name."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(directory, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks never evicts
                fcntl.flock(handle, fcntl.LOCK_SH)
            if directory.exists() and os.path.samestat(os.fstat(handle), os.stat(directory)):
                return handle
            os.close(handle)


def _evict(directory: Path) -> bool:
    """Remove an entry, unless somebody holds it."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        shutil.rmtree(directory, ignore_errors=True)
        return True
    finally:
        os.close(handle)
