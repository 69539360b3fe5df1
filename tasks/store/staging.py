"""Staging directories: files are written there before they are published. Those of killed processes are removed."""

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
    """Make a directory, and remove it afterwards. A lock on it tells other processes that its maker still runs."""
    while True:
        directory = parent / f"{socket.gethostname()}-{uuid.uuid4().hex}"
        try:
            directory.mkdir()
            handle = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # on a file system without locks, abandoned directories stay
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
    """Remove the staging directories of killed processes of this machine: children are large."""
    for directory in parent.glob(f"{socket.gethostname()}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)


def move_into_place(staged: Path, final: Path, record: str) -> None:
    """Rename a staging directory, which is atomic.

    A whole artifact at `final` stays as it is; a directory without the file `record` there is removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _sync(staged)
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
    """Turn the errors of a full or read-only disk into a StorageError.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _disk_refusal(error)
        if not reason:
            raise
        path = getattr(error, "filename", None) or place
        raise StorageError(f"cannot write to {path}: {reason}; free some space or choose another place") from error


def _disk_refusal(error: Exception) -> str | None:
    """The system's message of a full or read-only disk; none for any other error."""
    match = re.search(r"\(os error (\d+)\)", str(error))  # safetensors reports the system's errors in this form
    code = error.errno if isinstance(error, OSError) else int(match.group(1)) if match else None
    return os.strerror(code) if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) else None


def _sync(directory: Path) -> None:
    """Flush all files to the disk, and give them the umask's permissions: safetensors makes files private."""
    allowed = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(allowed)
            with path.open("rb") as file:
                os.fsync(file.fileno())
