"""Local copies of a bucket's artifacts, with a size limit: the least recently used entries are evicted first.

An entry is a directory, `<cache>/<key>/`. A reader pins it with a shared lock, so that neither this process nor another
can evict it meanwhile. The kernel releases the locks of a process that dies.
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
from glob import glob
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("puzzle")
EVICTION_MARGIN = 0.1
"""Share of the limit that an eviction frees in addition, so that not every download evicts."""


class _CachedArtifact(NamedTuple):
    used_ns: int
    size_bytes: int
    directory: Path


_pins: contextvars.ContextVar[dict[Path, int] | None] = contextvars.ContextVar("pins", default=None)


@contextlib.contextmanager
def pin_entries() -> Iterator[None]:
    """Entries pinned inside this block stay until its end. An entry pinned outside any stays as long as the process.

    A block counts for the thread or asyncio task that entered it; blocks nest.
    """
    pins: dict[Path, int] = {}
    token = _pins.set(pins)
    try:
        yield
    finally:
        _pins.reset(token)
        for handle in pins.values():
            os.close(handle)


class Cache:
    """A directory of entries that together take at most `limit_bytes`, pinned ones excepted."""

    def __init__(self, directory: Path, limit_bytes: float):
        self.directory, self.limit_bytes = directory, limit_bytes
        self._process_pins: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._counted_bytes = float("inf")  # of all entries at the last count, and of those this process added since
        self._added_bytes = 0.0  # by this process since the last count

    def pin(self, key: str) -> Path:
        """Pin an entry, which is made where there is none, and return its directory."""
        directory, block_pins = self.directory / key, _pins.get()
        pins = self._process_pins if block_pins is None else block_pins
        with self._lock:
            if directory not in pins or not directory.is_dir():
                if directory in pins:
                    os.close(pins.pop(directory))
                pins[directory] = _lock_shared(directory)
        with contextlib.suppress(OSError):
            os.utime(directory)
        return directory

    @contextlib.contextmanager
    def room_for(self, file: Path, size_bytes: int) -> Iterator[Path]:
        """Make a new file of this size beside `file`; the caller renames it to `file`, or else it is removed."""
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
        """Move published files into their entry, so that this machine need not fetch them.

        Args:
            key: of the artifact.
            staged: the directory of the files.
            place: the directory that they get within the entry.
        """
        with self._lock, contextlib.suppress(OSError):
            size_bytes = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
            if size_bytes > self.limit_bytes * (1 - EVICTION_MARGIN):
                return
            self._make_room(size_bytes)
            handle = _lock_shared(self.directory / key)
            try:
                staged.rename(self.directory / key / place)
            finally:
                os.close(handle)

    def drop(self, key: str) -> None:
        """Remove an entry; a reader can go on with the files that it has opened."""
        shutil.rmtree(self.directory / key, ignore_errors=True)

    def _make_room(self, size_bytes: int) -> None:
        """Evict until this many bytes fit. Counts all entries from time to time, since other processes add some too."""
        self._counted_bytes += size_bytes
        self._added_bytes += size_bytes
        if self._counted_bytes <= self.limit_bytes and self._added_bytes <= self.limit_bytes * EVICTION_MARGIN:
            return
        entries = sorted(self._entries())
        total = sum(entry.size_bytes for entry in entries) + size_bytes
        if total > self.limit_bytes:
            for entry in entries:
                if total <= self.limit_bytes * (1 - EVICTION_MARGIN):
                    break
                if _evict(entry.directory):
                    total -= entry.size_bytes
            if total > self.limit_bytes:
                log.warning(
                    "%s holds %.0f MiB, more than runtime.cache_size: tasks are reading all of it",
                    self.directory,
                    total / 2**20,
                )
        self._counted_bytes, self._added_bytes = total, 0.0

    def _entries(self) -> Iterator[_CachedArtifact]:
        for key in glob("[!.]*/v*/*", root_dir=self.directory):  # Path.glob fails where another process evicts
            directory = self.directory / key
            with contextlib.suppress(FileNotFoundError):
                used = directory.stat().st_mtime_ns
                yield _CachedArtifact(
                    used, sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()), directory
                )


def _lock_shared(directory: Path) -> int:
    """Make a directory where there is none, and return a file descriptor that holds a shared lock on it."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(directory, os.O_RDONLY)
            with contextlib.suppress(OSError):  # on a file system without locks nothing is evicted
                fcntl.flock(handle, fcntl.LOCK_SH)
            if directory.exists() and os.path.samestat(os.fstat(handle), os.stat(directory)):
                return handle
            os.close(handle)


def _evict(directory: Path) -> bool:
    """Remove an entry unless it is pinned; return whether it is gone."""
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
