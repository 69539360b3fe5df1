"""Directories that files are written into before they are published, and what killed processes left of them."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from puzzle_core.errors import StorageError


@contextlib.contextmanager
def directory_in_use(parent: Path) -> Iterator[Path]:
    """A new directory, removed afterwards, with a lock that tells others on this machine that its maker lives."""
    while True:
        directory = parent / f"{socket.gethostname()}-{uuid.uuid4().hex}"
        try:
            directory.mkdir()
            handle = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: what is left there stays there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if directory.exists():
            break
        os.close(handle)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(handle)


def clear_abandoned(parent: Path) -> None:
    """Remove what killed processes of this machine were staging: children are large."""
    for directory in parent.glob(f"{socket.gethostname()}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)


def move_into_place(staged: Path, final: Path, record: str) -> None:
    """Rename, which is atomic; a whole artifact that is there stays, and one without a record is put aside."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _finish(staged)
    while True:
        try:
            os.rename(staged, final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (final / record).exists():
            return
        with directory_in_use(staged.parent) as aside, contextlib.suppress(FileNotFoundError):
            os.rename(final, aside)


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Say what a disk that takes no more says.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _no_more_room(error)
        if not reason:
            raise
        named = getattr(error, "filename", None) or place
        raise StorageError(f"cannot write to {named}: {reason}; free some space or choose another place") from error


def _no_more_room(error: Exception) -> str | None:
    """What a full or read-only disk says for itself; none for any other error."""
    found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors passes on the system's errors
    code = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
    return os.strerror(code) if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) else None


def _finish(directory: Path) -> None:
    """Bring all files to the disk, and let others read them where the umask does: safetensors makes private ones."""
    allowed = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(allowed)
            with path.open("rb") as file:
                os.fsync(file.fileno())
