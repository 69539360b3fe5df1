"""The artifact store: a local directory or `s3://bucket/prefix`, through fsspec. The only file that knows buckets.

An artifact is `<root>/<key>/`: its files, then `record.json`, written last. A directory without a record does not
exist, so a crash at any moment leaves only whole artifacts. Artifacts are immutable and keyed by content: two writers
of one key write the same thing.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from puzzle_core.errors import ArtifactError, SpecError, StorageError
from puzzle_core.records import Record, Work, digest_file

MANIFEST = "record.json"


class StoredFile(Record):
    """Size and SHA-256 of one file of an artifact."""

    size_bytes: int
    sha256: str


class Manifest(Record):
    """`record.json`: what was asked, what came out, which files, and who made it when."""

    key: str
    work: dict[str, Any]
    record: dict[str, Any]
    files: dict[str, StoredFile]
    made_by: str
    made_at: str


class Store:
    """Artifacts by key."""

    def __init__(self, url: str, cache: Path):
        """Open a store.

        Args:
            url: a directory, or any fsspec URL such as `s3://bucket/prefix` (credentials from the environment).
            cache: local directory for the files of remote artifacts.

        Raises:
            SpecError: the URL's protocol is unknown.
        """
        self.url = url
        options = {"use_listings_cache": False} if url.startswith("s3://") else {}
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise SpecError(f"runtime.store {url!r} is no store: {error}") from error
        self._root, self._cache, self._checked = root.rstrip("/"), cache, set[str]()
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def has(self, key: str) -> bool:
        """Whether this artifact is there, whole."""
        return bool(self._fs.exists(f"{self._root}/{key}/{MANIFEST}"))

    def keys(self, stage: str = "") -> set[str]:
        """All keys of a stage, or of the store, from one listing."""
        with contextlib.suppress(FileNotFoundError):
            found = self._fs.find(f"{self._root}/{stage}")
            prefix = len(self._root.lstrip("/")) + 1
            return {path.lstrip("/")[prefix:].removesuffix(f"/{MANIFEST}") for path in found if path.endswith(MANIFEST)}
        return set()

    def manifest(self, key: str) -> Manifest:
        """The manifest of an artifact.

        Raises:
            ArtifactError: it is not in the store, or its manifest is not readable.
        """
        try:
            return Manifest.model_validate_json(self._fs.cat_file(f"{self._root}/{key}/{MANIFEST}"))
        except FileNotFoundError as error:
            raise ArtifactError(f"{key} is not in the store {self.url}: run the flow that makes it") from error
        except ValueError as error:
            raise ArtifactError(f"the manifest of {key} in {self.url} is damaged: delete that artifact") from error

    def fetch(self, key: str) -> Path:
        """A local directory with the artifact's files, checked against their digests once per process.

        Raises:
            ArtifactError: the artifact is missing, or a file is not what its manifest says.
        """
        manifest = self.manifest(key)
        directory = Path(self._root if self.is_local else self._cache) / key
        for name, entry in manifest.files.items():
            file = directory / name
            if not self.is_local and not (file.is_file() and file.stat().st_size == entry.size_bytes):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
                self._fs.get_file(f"{self._root}/{key}/{name}", str(partial))
                partial.replace(file)
            self._check(key, name, file, entry)
        return directory

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to write an artifact's files into, on the disk where they will stay; removed afterwards.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        parent = Path(self._root if self.is_local else self._cache) / ".staging"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _clear_abandoned(parent)
            with _directory_in_use(parent) as directory:
                yield directory
        except (OSError, SafetensorError) as error:
            reason = _no_more_room(error)
            if not reason:
                raise
            place = getattr(error, "filename", None) or parent
            raise StorageError(f"cannot write to {place}: {reason}; free some space or choose another place") from error

    def publish(self, work: Work, record: Record, staged: Path, made_by: str) -> None:
        """Make the staged files, with this record, the artifact of `work`."""
        files = {p.relative_to(staged).as_posix(): p for p in sorted(staged.rglob("*")) if p.is_file()}
        manifest = Manifest(
            key=work.key,
            work=work.model_dump(mode="json"),
            record=record.model_dump(mode="json"),
            files={n: StoredFile(size_bytes=p.stat().st_size, sha256=digest_file(p)) for n, p in files.items()},
            made_by=made_by,
            made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        if self.is_local:
            manifest.write(staged / MANIFEST)
            self._move_into_place(staged, Path(self._root) / work.key)
            return
        for name, path in files.items():
            self._fs.put_file(str(path), f"{self._root}/{work.key}/{name}")
        self._fs.pipe_file(f"{self._root}/{work.key}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())

    def delete(self, key: str) -> None:
        """Remove an artifact, its manifest first."""
        self._fs.rm_file(f"{self._root}/{key}/{MANIFEST}")
        self._fs.rm(f"{self._root}/{key}", recursive=True)

    def _move_into_place(self, staged: Path, final: Path) -> None:
        """Rename, which is atomic; a whole artifact that is there stays, and one without a record is put aside."""
        final.parent.mkdir(parents=True, exist_ok=True)
        _sync(staged)
        while True:
            try:
                os.rename(staged, final)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if (final / MANIFEST).exists():
                return
            with _directory_in_use(staged.parent) as aside, contextlib.suppress(FileNotFoundError):
                os.rename(final, aside)

    def _check(self, key: str, name: str, file: Path, entry: StoredFile) -> None:
        label = f"{key}/{name}"
        if label in self._checked:
            return
        found = file.stat().st_size if file.is_file() else None
        if found != entry.size_bytes or digest_file(file) != entry.sha256:
            now = "nothing" if found is None else f"{found:,} bytes{', altered' if found == entry.size_bytes else ''}"
            if not self.is_local:
                file.unlink(missing_ok=True)  # it may be our copy that is damaged: the next run fetches it again
            raise ArtifactError(
                f"{label} in {self.url} is not what was stored ({entry.size_bytes:,} bytes then, {now} now): "
                f"delete {self.url}/{key} and run again"
            )
        self._checked.add(label)


def _no_more_room(error: Exception) -> str | None:
    """What a full or read-only disk says for itself; none for any other error."""
    found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors passes on the system's errors
    code = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
    return os.strerror(code) if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES) else None


@contextlib.contextmanager
def _directory_in_use(parent: Path) -> Iterator[Path]:
    """A new directory, removed afterwards, with a lock that tells others on this machine that its maker lives."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f"{socket.gethostname()}-", dir=parent))
        try:
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


def _clear_abandoned(parent: Path) -> None:
    """Remove what killed processes of this machine were staging: children are large."""
    for directory in parent.glob(f"{socket.gethostname()}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
