"""The parent that a process keeps open. It is opened again when one of its files has changed.

A process may live longer than the files of a parent: a checkpoint is written anew in place, or the directory is a link
that points elsewhere by now. A GGUF file is imported into scratch, under the digest of its content.
"""

import re
import threading
from pathlib import Path
from typing import NamedTuple

from puzzle_core.errors import ParentError
from puzzle_core.installed_file import local_path
from puzzle_core.model.parent import Parent, parent_files
from puzzle_core.model.parent_config import fetch
from puzzle_core.spec import ParentSpec
from tasks.runtime.digest_cache import Signature, file_digest, signature_of
from tasks.runtime.locks import artifact_lock

_COMMIT = re.compile(r"[0-9a-f]{40}")


class _OpenedEntry(NamedTuple):
    spec: ParentSpec
    signature: Signature
    parent: Parent


_lock = threading.Lock()
_held: list[_OpenedEntry] = []  # one at most: a parent keeps gigabytes of weights


def open_parent(spec: ParentSpec, scratch: Path) -> Parent:
    """The parent as its files are now: the one that this process has open, or it is opened.

    Args:
        spec: names the parent.
        scratch: local directory, which a GGUF file is imported into.

    Raises:
        ParentError: it cannot be opened, or a file changes at this moment.
    """
    with _lock:
        if not (_held and _held[0].spec == spec and _is_current(_held[0], scratch)):
            _held[:] = [_open(spec, scratch)]
        return _held[0].parent


def hub_commit(spec: ParentSpec, parent: Parent) -> str | None:
    """The commit of the hub that this parent was fetched at; none of a directory."""
    name = parent.directory.name
    return name if not local_path(spec.path).exists() and _COMMIT.fullmatch(name) else None


def _open(spec: ParentSpec, scratch: Path) -> _OpenedEntry:
    file = local_path(spec.path)
    directory = _imported(file, scratch) if file.is_file() else fetch(spec)
    before = _signature(directory)
    parent = Parent(spec, directory)
    if _signature(directory) != before:
        raise ParentError(
            f"files of the parent {directory} change while they are opened: run again once they are whole"
        )
    return _OpenedEntry(spec, before, parent)


def _imported(file: Path, scratch: Path) -> Path:
    """The directory that a GGUF file is imported into; it is made where scratch has none.

    Raises:
        ParentError: the file cannot be imported, or changes meanwhile.
    """
    from puzzle_core.gguf_import.import_gguf import import_gguf

    directory = _import_directory(file, scratch)
    with artifact_lock(f"import into {directory}"):
        if not directory.exists():
            import_gguf(file, directory)
    if _import_directory(file, scratch) != directory:
        raise ParentError(f"{file} changes while it is imported: run again once it is whole")
    return directory


def _import_directory(file: Path, scratch: Path) -> Path:
    from puzzle_core.gguf_import.import_gguf import IMPORT_VERSION  # not at the start of every process

    digest = file_digest(file, scratch)
    return (scratch / "imported" / f"{digest[:24]}-v{IMPORT_VERSION}").resolve()


def _is_current(held: _OpenedEntry, scratch: Path) -> bool:
    """Whether a new look at the parent's place finds the files that were opened."""
    path = local_path(held.spec.path)
    if path.is_dir():
        directory = path.resolve()
    elif path.is_file():
        directory = _import_directory(path, scratch)
    elif _COMMIT.fullmatch(held.spec.revision or ""):
        directory = held.parent.directory
    else:
        return False  # the commit of a branch is asked for anew
    return directory == held.parent.directory and _signature(directory) == held.signature


def _signature(directory: Path) -> Signature:
    return signature_of(parent_files(directory))
