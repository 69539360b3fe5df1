"""The check that a run fits on its disks, made before it starts."""

import shutil
from pathlib import Path

from puzzle_core.errors import StorageError
from tasks.runtime.context import RunContext


def check_disk_space(context: RunContext, scratch_bytes: int, store_bytes: int) -> None:
    """Refuse a run that the disks cannot hold; the space of a remote store is not known and not checked.

    Raises:
        StorageError: says how much is needed, how much is free, and where.
    """
    needs = {"runtime.scratch": (context.scratch, scratch_bytes)}
    if context.store().is_local:
        needs["runtime.store"] = (Path(context.runtime.store), store_bytes)
    for key, (directory, needed_bytes) in needs.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the directory {directory} ({error.strerror}): set {key}") from error
        free_bytes = shutil.disk_usage(directory).free
        if needed_bytes > free_bytes:
            raise StorageError(
                f"{directory} has {free_bytes / 2**20:,.0f} MiB free, and this run needs up to "
                f"{needed_bytes / 2**20:,.0f} MiB there: free some space, or set {key} to a larger disk"
            )
