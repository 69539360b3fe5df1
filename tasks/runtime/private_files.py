"""Directories and databases that only their owner may read: what runs say, their parameters and their paths."""

import contextlib
import os
import stat
from pathlib import Path

from puzzle_core.errors import PuzzleError

DATA = ".puzzle"
"""The directory that holds all that commands and services keep."""


def private_directory(path: Path) -> None:
    """Make a directory; `.puzzle` and what lies below it get mode 0700, and databases in them 0600."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for directory in (path, *path.absolute().parents):
        if DATA not in directory.absolute().parts:
            return
        with contextlib.suppress(PermissionError):  # another user's, who decides who may read it
            directory.chmod(0o700)
            for database in directory.glob("*.db*"):
                database.chmod(0o600)


def check_owned(directory: Path) -> None:
    """Refuse a directory in a place that all users may write to, unless it is this user's own.

    Raises:
        PuzzleError: it is a link or no directory, another user's, or others may write into it.
    """
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PuzzleError(f"{directory} is not a directory: remove it, or set PUZZLE_LOCK_DIR to one of your own")
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PuzzleError(
            f"{directory} belongs to user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):04o}: locks need "
            "a directory of your own that nobody else may write to; remove it, or set PUZZLE_LOCK_DIR to another"
        )
