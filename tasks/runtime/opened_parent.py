"""The parent that a process keeps open. It is opened again as soon as one of its files is another one.

A process may live longer than the files of a parent: a checkpoint is written anew in place, or the directory is a link
that points elsewhere by now.
"""

import re
import threading
from pathlib import Path
from typing import NamedTuple

from puzzle_core.errors import ParentError
from puzzle_core.model.parent import Parent, source_files
from puzzle_core.model.parent_config import fetch
from puzzle_core.spec import ParentSpec
from tasks.runtime.digest_cache import Signature, signature_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


class _OpenedEntry(NamedTuple):
    spec: ParentSpec
    signature: Signature
    parent: Parent


_lock = threading.Lock()
_held: list[_OpenedEntry] = []  # one at most: a parent keeps gigabytes of weights


def open_parent(spec: ParentSpec) -> Parent:
    """The parent as its files are now: the one that this process has open, or it is opened.

    Raises:
        ParentError: it cannot be opened, or a file changes at this moment.
    """
    with _lock:
        if not (_held and _held[0].spec == spec and _is_current(_held[0])):
            _held[:] = [_open(spec)]
        return _held[0].parent


def hub_commit(spec: ParentSpec, parent: Parent) -> str | None:
    """The commit of the hub that this parent was fetched at; none of a directory."""
    name = parent.directory.name
    return name if not Path(spec.path).is_dir() and _COMMIT.fullmatch(name) else None


def _open(spec: ParentSpec) -> _OpenedEntry:
    directory = fetch(spec)
    before = _signature(directory)
    parent = Parent(spec, directory)
    if _signature(directory) != before:
        raise ParentError(
            f"files of the parent {directory} change while they are opened: run again once they are whole"
        )
    return _OpenedEntry(spec, before, parent)


def _is_current(held: _OpenedEntry) -> bool:
    """Whether a new look at the parent's place finds the files that were opened."""
    if Path(held.spec.path).is_dir():
        directory = Path(held.spec.path).resolve()
    elif _COMMIT.fullmatch(held.spec.revision or ""):
        directory = held.parent.directory
    else:
        return False  # the commit of a branch is asked for anew
    return directory == held.parent.directory and _signature(directory) == held.signature


def _signature(directory: Path) -> Signature:
    return signature_of(source_files(directory))
