"""The artifact store: a local directory or `s3://bucket/prefix`, with the same behaviour.

An artifact is `<root>/<key>/`: its files, then `record.json`, written last. Without `record.json` it does not exist, so
a crash at any moment leaves only whole artifacts. Artifacts never change; their keys are digests of their work. In a
bucket the files lie in a directory named by their content, so two writers of one key never overwrite each other's
files, and the record is created only if there is none: the first writer's becomes the artifact. Files are checked
against the record when they are read.
"""

import contextlib
import datetime
import hashlib
import os
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from puzzle_core.errors import ArtifactError, DamagedError
from puzzle_core.quantities import parse_memory
from puzzle_core.records import Record, Work, digest_file, write_text_atomic
from puzzle_core.spec import RuntimeSpec
from tasks.store.bucket import Bucket, FileStatus
from tasks.store.cache import Cache
from tasks.store.manifest import KEY, MANIFEST, Manifest, StoredFile, check_key, content_name
from tasks.store.origin import Origin
from tasks.store.packs import RecordText, pack_groups, read_pack, write_pack
from tasks.store.staging import clear_abandoned, directory_in_use, move_into_place, writing_to

DOWNLOADS = 2
"""Downloads of one file with a wrong digest after which the bucket's copy, not the transfer, counts as damaged."""

OnCorruption = Literal["refuse", "recompute"]
R = TypeVar("R", bound=Record)


class Store:
    """Artifacts by key."""

    @classmethod
    def of(cls, runtime: RuntimeSpec) -> "Store":
        """The store that these runtime settings name."""
        cache_bytes = parse_memory(runtime.cache_size).value
        return cls(runtime.store, Path(runtime.scratch) / "store-cache", cache_bytes, runtime.on_corruption)

    def __init__(
        self,
        url: str,
        cache: Path,
        cache_bytes: float = 20 * 2**30,
        on_corruption: OnCorruption = "refuse",
    ):
        """Open a store; sends no request to a bucket yet.

        Args:
            url: a directory, or an fsspec URL such as `s3://bucket/prefix` (credentials from the environment).
            cache: local directory for copies of remote artifacts.
            cache_bytes: limit of these copies; those that tasks are reading may exceed it.
            on_corruption: "refuse" leaves a damaged artifact; "recompute" removes it, so the next run makes it again.

        Raises:
            SpecError: the URL's protocol is unknown, or the URL holds credentials.
        """
        self.url, self._on_corruption, self._checked = url, on_corruption, set[str]()
        self.is_local = "://" not in url
        self._root = Path(url)
        self._bucket = None if self.is_local else Bucket(url)
        self._cache = Cache(cache, cache_bytes)
        self._tags: dict[str, str] = {}  # tags of the bucket's records by key, as last listed
        self._texts: dict[str, RecordText] = {}  # records of the bucket's artifacts, which do not change
        self._manifests: dict[str, Manifest] = {}  # the same, parsed
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def place(self) -> str:
        """The store's absolute name: equal for runs started in different directories."""
        return str(self._root.resolve()) if self.is_local else self.url.rstrip("/")

    @property
    def bucket(self) -> Bucket | None:
        """The bucket of a remote store; none of a local directory."""
        return self._bucket

    def add_beside(self, key: str, last: str, write: Callable[[Path], None]) -> str:
        """Upload files beside those of an artifact of a bucket, for programs that look for them there.

        They are no part of the artifact, and go when it is deleted.

        Args:
            key: of the artifact.
            last: the name of the file that is uploaded last; where it is there, so are the others.
            write: writes the files to a directory; none has the name of a file of the artifact. It is called where
                `last` is not there yet.

        Returns:
            The URI of the place where the artifact's files and these lie.
        """
        assert self._bucket is not None
        place = f"{key}/{self.manifest(key).place}"
        if not self._bucket.exists(f"{place}/{last}"):
            with tempfile.TemporaryDirectory() as temporary:
                directory = Path(temporary)
                write(directory)
                names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
                for name in sorted(names, key=last.__eq__):
                    self._bucket.put(directory / name, f"{place}/{name}")
        return f"{self.place}/{place}"

    def has(self, key: str) -> bool:
        """Whether the store has this artifact."""
        if self._bucket is None:
            return (self._root / key / MANIFEST).exists()
        return self._bucket.exists(f"{key}/{MANIFEST}")

    def keys(self, stage: str = "") -> set[str]:
        """All keys of a stage, or of the store, from one listing."""
        records = (path.removesuffix(f"/{MANIFEST}") for path in self.listing(stage) if path.endswith(f"/{MANIFEST}"))
        return {key for key in records if KEY.fullmatch(key)}

    def listing(self, prefix: str = "") -> dict[str, FileStatus]:
        """Every file below a prefix, by path; files without a manifest are included."""
        if self._bucket is None:
            return dict(_walk(self._root, prefix))
        entries = self._bucket.listing(prefix)
        ending = f"/{MANIFEST}"
        tags = {path.removesuffix(ending): entry.tag for path, entry in entries.items() if path.endswith(ending)}
        for key in [key for key, tag in tags.items() if key in self._texts and self._texts[key].tag not in ("", tag)]:
            self._forget(key)  # it was removed and made again by another process
        self._tags |= tags
        return entries

    def manifest(self, key: str) -> Manifest:
        """The manifest of an artifact.

        Raises:
            ArtifactError: it is not in the store, or its manifest is not readable.
        """
        return self.manifests([key])[key]

    def manifests(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """The manifests of many artifacts, read in parallel. A bucket's manifest is read once per process.

        Raises:
            ArtifactError: one is not in the store, or not readable.
            SpecError: one does not have the form of a key.
        """
        wanted = [check_key(key) for key in dict.fromkeys(keys)]
        if self._bucket is None:
            return {key: self._parse(key, _read(self._root / key / MANIFEST)) for key in wanted}
        unknown = [key for key in wanted if key not in self._manifests]
        for group in pack_groups(wanted) if unknown else ():
            self._texts |= read_pack(self._bucket, group, self._tags)
        tags = {key: self._tags.get(key, "") for key in unknown if key not in self._texts}
        answers = self._bucket.read_all([f"{key}/{MANIFEST}" for key in tags])
        self._texts |= {
            key: RecordText(tag, answers[p]) for key, tag in tags.items() if (p := f"{key}/{MANIFEST}") in answers
        }
        for key in unknown:
            self._manifests[key] = self._parse(key, self._texts[key].text if key in self._texts else None)
        return {key: self._manifests[key] for key in wanted}

    def record(self, kind: type[R], key: str) -> R:
        """The stage's record of an artifact.

        Raises:
            ArtifactError: it is not in the store, or its manifest is not readable.
        """
        return kind.model_validate(self.manifest(key).record)

    def records(self, kind: type[R], keys: Iterable[str]) -> dict[str, R]:
        """The records of many artifacts of one stage, by key, read as `manifests` reads them.

        Raises:
            ArtifactError: one is not in the store, or not readable.
        """
        return {key: kind.model_validate(manifest.record) for key, manifest in self.manifests(keys).items()}

    def pack(self, keys: Iterable[str]) -> None:
        """Write the manifests of these artifacts as packs, which later calls of `manifests` with the same keys read.

        Raises:
            ArtifactError: one is not in the store, or not readable.
        """
        groups = pack_groups(dict.fromkeys(keys))
        if self._bucket is None or not groups:
            return
        for group in groups:
            if any(key not in self._tags for key in group):
                self.listing(group[0].partition("/")[0])
            for key in group:  # read under another tag than the one now listed: read it again
                if key in self._texts and self._texts[key].tag != self._tags.get(key):
                    del self._texts[key], self._manifests[key]
            self.manifests(group)
            write_pack(self._bucket, group, self._tags, self._texts)

    def fetch(self, key: str) -> Path:
        """A local directory with the artifact's files, checked against their digests once per process.

        Copies of a bucket's files stay until the end of the enclosing `pin_entries()`.

        Raises:
            ArtifactError: the artifact is missing.
            DamagedError: a file is not what its manifest says.
            StorageError: the bucket gives no good answer, or the cache's disk is full.
        """
        with self._fetching[key]:
            if self._bucket is None:
                return self._check_local(self.manifest(key))
            with writing_to(self._cache.directory):
                try:
                    return self._download(self.manifest(key))
                except FileNotFoundError:  # it may have been replaced after its manifest was read
                    self._forget(key)
                manifest = self.manifest(key)
                try:
                    return self._download(manifest)
                except FileNotFoundError as error:
                    name = str(error)
                    self._raise_damaged(key, name, manifest.files[name])

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory for an artifact's files, on the disk where they will stay; removed afterwards.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        parent = (self._root if self.is_local else self._cache.directory) / ".staging"
        with writing_to(parent):
            parent.mkdir(parents=True, exist_ok=True)
            clear_abandoned(parent)
            with directory_in_use(parent) as directory:
                yield directory

    def publish(self, work: Work, record: Record, staged: Path, made_by: str, origin: Origin | None = None) -> None:
        """Make the staged files and this record the artifact of `work`, unless the store has it.

        Args:
            work: what the stage was asked.
            record: what it answers.
            staged: a directory of `staging`.
            made_by: the name of the run.
            origin: what made the artifact.

        Raises:
            StorageError: the bucket refuses, or gives no good answer.
        """
        paths = {p.relative_to(staged).as_posix(): p for p in sorted(staged.rglob("*")) if p.is_file()}
        files = {n: StoredFile(size_bytes=p.stat().st_size, sha256=digest_file(p)) for n, p in paths.items()}
        manifest = Manifest(
            key=work.key,
            work=work.model_dump(mode="json"),
            record=record.model_dump(mode="json"),
            files=files,
            made_by=made_by,
            made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            place="" if self.is_local else content_name(files),
            origin=origin,
        )
        if self._bucket is None:
            manifest.write(staged / MANIFEST)
            move_into_place(staged, self._root / work.key, MANIFEST)
        elif not self.has(work.key) and self._upload(self._bucket, manifest, paths):
            self._cache.adopt(work.key, staged, manifest.place)

    def documents(self, folder: str) -> dict[str, bytes]:
        """The small files of a folder that are no artifacts, by path."""
        paths = sorted(self.listing(f"{folder}/"))
        if self._bucket is None:
            return {path: data for path in paths if (data := _read(self._root / path)) is not None}
        return self._bucket.read_all(paths)

    def write_document(self, path: str, data: bytes) -> None:
        """Write one of `documents`, over one that exists."""
        if self._bucket is None:
            write_text_atomic(self._root / path, data.decode())
        else:
            self._bucket.write(path, data)

    def delete(self, key: str) -> None:
        """Remove an artifact, its manifest first; artifacts that refer to it stay.

        Raises:
            SpecError: this does not have the form of a key.
        """
        check_key(key)
        if self._bucket is None:
            (self._root / key / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self._root / key, ignore_errors=True)
            return
        self._bucket.remove([f"{key}/{MANIFEST}", *self._bucket.listing(f"{key}/")])
        self._forget(key)

    def remove_stray(self, path: str) -> None:
        """Remove one file that belongs to no artifact."""
        if self._bucket is None:
            (self._root / path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (self._root / path).parent.rmdir()
        else:
            self._bucket.remove([path])

    def drop_unfinished_uploads(self, before_s: float, dry_run: bool) -> int:
        """Abort unfinished multipart uploads that began before `before_s` (epoch seconds).

        Returns:
            How many there are; with `dry_run` none is aborted.
        """
        if self._bucket is None:
            return 0
        old = [upload for upload, started_s in self._bucket.unfinished_uploads().items() if started_s < before_s]
        for path, upload in () if dry_run else old:
            self._bucket.abort_upload(path, upload)
        return len(old)

    def damage(self, key: str) -> dict[str, str]:
        """What is wrong with an artifact, by file. Reads every byte in the store itself, not in the cache."""
        manifest = self.manifest(key)
        damage = {name: self._damage(manifest, name) for name in manifest.files}
        return {name: what for name, what in damage.items() if what}

    def _upload(self, bucket: Bucket, manifest: Manifest, paths: dict[str, Path]) -> bool:
        """Upload files, and return whether they are the artifact; if another writer was first, remove them."""
        key, prefix = manifest.key, f"{manifest.key}/{manifest.place}"
        for name, path in paths.items():
            bucket.put(path, f"{prefix}/{name}")
        self._forget(key)
        record = f"{manifest.model_dump_json(indent=1)}\n".encode()
        if bucket.put_new(f"{key}/{MANIFEST}", record) or self.manifest(key).place == manifest.place:
            return True
        bucket.remove(f"{prefix}/{name}" for name in paths)
        return False

    def _download(self, manifest: Manifest) -> Path:
        """Download the files that the cache lacks, and check those that it has.

        Raises:
            FileNotFoundError: the bucket lacks a file; its argument is the file's name.
        """
        assert self._bucket is not None
        directory = self._cache.pin(manifest.key) / manifest.place
        for name, entry in manifest.files.items():
            file, label = directory / name, f"{manifest.key}/{name}"
            cached = file.is_file() and file.stat().st_size == entry.size_bytes
            if not (cached and (label in self._checked or digest_file(file) == entry.sha256)):
                self._download_file(self._bucket, manifest, name, file)
            self._checked.add(label)
        return directory

    def _download_file(self, bucket: Bucket, manifest: Manifest, name: str, file: Path) -> None:
        entry = manifest.files[name]
        for _ in range(DOWNLOADS):
            with self._cache.room_for(file, entry.size_bytes) as partial:
                try:
                    sha256 = bucket.download(f"{manifest.key}/{manifest.place}/{name}", entry.size_bytes, partial)
                except FileNotFoundError as error:
                    raise FileNotFoundError(name) from error
                if sha256 == entry.sha256:
                    partial.replace(file)
                    return
        self._raise_damaged(manifest.key, name, entry)

    def _check_local(self, manifest: Manifest) -> Path:
        for name, entry in manifest.files.items():
            label = f"{manifest.key}/{name}"
            if label not in self._checked:
                if self._damage(manifest, name):
                    self._raise_damaged(manifest.key, name, entry)
                self._checked.add(label)
        return self._root / manifest.key / manifest.place

    def _damage(self, manifest: Manifest, name: str) -> str:
        """What the store has in place of a file; empty where the file is as the manifest says."""
        entry, path = manifest.files[name], f"{manifest.key}/{manifest.place}/{name}".replace("//", "/")
        if self._bucket is None:
            file = self._root / path
            size = file.stat().st_size if file.is_file() else None
            sha256 = digest_file(file) if size == entry.size_bytes else ""
        else:
            size, hasher = self._bucket.size_bytes(path), hashlib.sha256()
            for chunk in self._bucket.chunks(path, entry.size_bytes) if size == entry.size_bytes else ():
                hasher.update(chunk)
            sha256 = hasher.hexdigest()
        if size is None:
            return "nothing"
        altered = ", altered" if size == entry.size_bytes else ""
        return "" if sha256 == entry.sha256 and altered else f"{size:,} bytes{altered}"

    def _raise_damaged(self, key: str, name: str, entry: StoredFile) -> NoReturn:
        """Raise an error that says what is damaged; remove the artifact first where `on_corruption` is "recompute".

        Raises:
            DamagedError: always.
        """
        now = self._damage(self.manifest(key), name) or "something else after download"
        message = f"{key}/{name} in {self.url} is not what was stored ({entry.size_bytes:,} bytes then, {now} now)"
        if self._on_corruption == "refuse":
            raise DamagedError(f"{message}: delete {self.url}/{key} and run again")
        self.delete(key)
        raise DamagedError(f"{message}: it was removed, as runtime.on_corruption says; run again to make it anew")

    def _parse(self, key: str, text: bytes | None) -> Manifest:
        if text is None:
            raise ArtifactError(f"{key} is not in the store {self.url}: run the flow that makes it")
        try:
            manifest = Manifest.model_validate_json(text)
        except ValueError as error:
            raise ArtifactError(f"the manifest of {key} in {self.url} is damaged: delete that artifact") from error
        if manifest.key != key:
            raise ArtifactError(f"the manifest of {key} in {self.url} is that of {manifest.key}: delete that artifact")
        return manifest

    def _forget(self, key: str) -> None:
        for cached in (self._manifests, self._texts, self._tags):
            cached.pop(key, None)
        self._checked -= {label for label in self._checked if label.startswith(f"{key}/")}
        self._cache.drop(key)


def _read(file: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return file.read_bytes()
    return None


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, FileStatus]]:
    """Files below a local root by relative path, without the staging directory."""
    for directory, names, files in os.walk(root / prefix):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in files:
            path = Path(directory, name)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield path.relative_to(root).as_posix(), FileStatus(status.st_size, status.st_mtime, "")
