"""The artifact store: a local directory or `s3://bucket/prefix`, which behave alike.

An artifact is `<root>/<key>/`: its files, then `record.json`, written last. Without a record it does not exist, so a
crash at any moment leaves only whole artifacts. Artifacts are immutable and keyed by content. In a bucket the files
lie below a directory named by their content, so two writers of one key never overwrite each other's, and the record
is created only where there is none: the first one is the artifact. What is read is checked against the record.
"""

import contextlib
import datetime
import hashlib
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

from puzzle_core.errors import ArtifactError, DamagedError
from puzzle_core.quantities import parse_memory
from puzzle_core.records import Record, Work, digest_file
from puzzle_core.spec import RuntimeSpec
from tasks.store.bucket import Bucket, Entry
from tasks.store.cache import Cache
from tasks.store.manifest import KEY, MANIFEST, Manifest, StoredFile, check_key, name_of
from tasks.store.packs import Seen, packed_together, read_pack, write_pack
from tasks.store.staging import clear_abandoned, directory_in_use, move_into_place, writing_to

DOWNLOADS = 2
"""How often a file is fetched before the bucket's copy counts as damaged, and not the way from there."""

OnCorruption = Literal["refuse", "recompute"]


class Store:
    """Artifacts by key."""

    @classmethod
    def of(cls, runtime: RuntimeSpec) -> "Store":
        """The store that a run's settings name, or a command's, which go by the defaults but for its place."""
        cache_bytes = parse_memory(runtime.cache_size).value
        return cls(runtime.store, Path(runtime.scratch) / "store-cache", cache_bytes, runtime.on_corruption)

    def __init__(
        self,
        url: str,
        cache: Path,
        cache_bytes: float = 20 * 2**30,
        on_corruption: OnCorruption = "refuse",
    ):
        """Open a store; a bucket is not asked before it is needed.

        Args:
            url: a directory, or an fsspec URL such as `s3://bucket/prefix` (credentials from the environment).
            cache: local directory for the files of remote artifacts.
            cache_bytes: what these may take; what is being read may exceed it.
            on_corruption: leave a damaged artifact where it is, or remove it, so that the next run makes it again.

        Raises:
            SpecError: the URL's protocol is unknown, or the URL holds credentials.
        """
        self.url, self._on_corruption, self._checked = url, on_corruption, set[str]()
        self.is_local = "://" not in url
        self._root = Path(url)
        self._bucket = None if self.is_local else Bucket(url)
        self._cache = Cache(cache, cache_bytes)
        self._tags: dict[str, str] = {}  # of the bucket's records by key, as last listed
        self._seen: dict[str, Seen] = {}  # records of the bucket's artifacts, which do not change
        self._manifests: dict[str, Manifest] = {}  # the same, parsed
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def place(self) -> str:
        """One name for the store, wherever a run was started."""
        return str(self._root.resolve()) if self.is_local else self.url.rstrip("/")

    def has(self, key: str) -> bool:
        """Whether this artifact is there, whole."""
        if self._bucket is None:
            return (self._root / key / MANIFEST).exists()
        return self._bucket.exists(f"{key}/{MANIFEST}")

    def keys(self, stage: str = "") -> set[str]:
        """All keys of a stage, or of the store, from one listing."""
        records = (path.removesuffix(f"/{MANIFEST}") for path in self.listing(stage) if path.endswith(f"/{MANIFEST}"))
        return {key for key in records if KEY.fullmatch(key)}

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        """Every file below a prefix, those of artifacts that are not whole too, by path."""
        if self._bucket is None:
            return dict(_walk(self._root, prefix))
        found = self._bucket.listing(prefix)
        ending = f"/{MANIFEST}"
        self._tags |= {path.removesuffix(ending): entry.tag for path, entry in found.items() if path.endswith(ending)}
        return found

    def manifest(self, key: str) -> Manifest:
        """The manifest of an artifact.

        Raises:
            ArtifactError: it is not in the store, or its manifest is not readable.
        """
        return self.manifests([key])[key]

    def manifests(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """The manifests of many artifacts, read side by side; what was read before is not asked for again.

        Raises:
            ArtifactError: one is not in the store, or not readable.
            SpecError: one is no key of an artifact, but for instance a path that leaves the store.
        """
        wanted = [check_key(key) for key in dict.fromkeys(keys)]
        if self._bucket is None:
            return {key: self._parse(key, _read(self._root / key / MANIFEST)) for key in wanted}
        unknown = [key for key in wanted if key not in self._manifests]
        for together in packed_together(wanted) if unknown else ():
            self._seen |= read_pack(self._bucket, together, self._tags)
        tags = {key: self._tags.get(key, "") for key in unknown if key not in self._seen}
        answers = self._bucket.read_all([f"{key}/{MANIFEST}" for key in tags])
        self._seen |= {key: Seen(tag, answers[p]) for key, tag in tags.items() if (p := f"{key}/{MANIFEST}") in answers}
        for key in unknown:
            self._manifests[key] = self._parse(key, self._seen[key].text if key in self._seen else None)
        return {key: self._manifests[key] for key in wanted}

    def pack(self, keys: Iterable[str]) -> None:
        """Have the manifests of many artifacts come in one piece whenever just these are asked for together.

        Raises:
            ArtifactError: one is not in the store, or not readable.
        """
        groups = packed_together(dict.fromkeys(keys))
        if self._bucket is None or not groups:
            return
        for together in groups:
            if any(key not in self._tags for key in together):
                self.listing(together[0].partition("/")[0])
            for key in together:  # read before it was listed: nobody can say whether as it is listed
                if key in self._seen and self._seen[key].tag != self._tags.get(key):
                    del self._seen[key], self._manifests[key]
            self.manifests(together)
            write_pack(self._bucket, together, self._tags, self._seen)

    def fetch(self, key: str) -> Path:
        """A local directory with the artifact's files, checked against their digests once per process.

        Those of a bucket's artifact stay there until the end of the enclosing `reading()`.

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
                except FileNotFoundError:  # it may have been made anew since we read its manifest
                    self._forget(key)
                manifest = self.manifest(key)
                try:
                    return self._download(manifest)
                except FileNotFoundError as error:
                    name = str(error)
                    self._refuse(key, name, manifest.files[name])

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory to write an artifact's files into, on the disk where they will stay; removed afterwards.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        parent = (self._root if self.is_local else self._cache.directory) / ".staging"
        with writing_to(parent):
            parent.mkdir(parents=True, exist_ok=True)
            clear_abandoned(parent)
            with directory_in_use(parent) as directory:
                yield directory

    def publish(self, work: Work, record: Record, staged: Path, made_by: str) -> None:
        """Make the staged files, with this record, the artifact of `work`, unless there is one already.

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
            place="" if self.is_local else name_of(files),
        )
        if self._bucket is None:
            manifest.write(staged / MANIFEST)
            move_into_place(staged, self._root / work.key, MANIFEST)
        elif not self.has(work.key) and self._upload(self._bucket, manifest, paths):
            self._cache.adopt(work.key, staged, manifest.place)

    def delete(self, key: str) -> None:
        """Remove an artifact, its manifest first; what refers to it is not asked.

        Raises:
            SpecError: this is no key of an artifact.
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
        """Drop uploads in parts that began before a moment and never ended.

        Returns:
            How many.
        """
        if self._bucket is None:
            return 0
        old = [upload for upload, began_s in self._bucket.unfinished_uploads().items() if began_s < before_s]
        for path, upload in () if dry_run else old:
            self._bucket.abort_upload(path, upload)
        return len(old)

    def damage(self, key: str) -> dict[str, str]:
        """What is wrong with an artifact, by file, after a look at every byte that the store holds; not of copies."""
        manifest = self.manifest(key)
        found = {name: self._found(manifest, name) for name in manifest.files}
        return {name: said for name, said in found.items() if said}

    def _upload(self, bucket: Bucket, manifest: Manifest, paths: dict[str, Path]) -> bool:
        """Whether these files are the artifact now; if another writer was first with others, ours are removed."""
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
        """Fetch what the cache lacks, and check what it has.

        Raises:
            FileNotFoundError: the bucket lacks a file, whose name it is.
        """
        assert self._bucket is not None
        directory = self._cache.hold(manifest.key) / manifest.place
        for name, entry in manifest.files.items():
            file, label = directory / name, f"{manifest.key}/{name}"
            there = file.is_file() and file.stat().st_size == entry.size_bytes
            if not (there and (label in self._checked or digest_file(file) == entry.sha256)):
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
        self._refuse(manifest.key, name, entry)

    def _check_local(self, manifest: Manifest) -> Path:
        for name, entry in manifest.files.items():
            label = f"{manifest.key}/{name}"
            if label not in self._checked:
                if self._found(manifest, name):
                    self._refuse(manifest.key, name, entry)
                self._checked.add(label)
        return self._root / manifest.key / manifest.place

    def _found(self, manifest: Manifest, name: str) -> str:
        """What the store holds in place of a file; empty when it is what the manifest says."""
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

    def _refuse(self, key: str, name: str, entry: StoredFile) -> NoReturn:
        """Say what is damaged, and remove the artifact where the spec wants that.

        Raises:
            DamagedError: always.
        """
        now = self._found(self.manifest(key), name) or "something else on its way here"
        said = f"{key}/{name} in {self.url} is not what was stored ({entry.size_bytes:,} bytes then, {now} now)"
        if self._on_corruption == "refuse":
            raise DamagedError(f"{said}: delete {self.url}/{key} and run again")
        self.delete(key)
        raise DamagedError(f"{said}: it was removed, as runtime.on_corruption says; run again to make it anew")

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
        for known in (self._manifests, self._seen, self._tags):
            known.pop(key, None)
        self._checked -= {label for label in self._checked if label.startswith(f"{key}/")}
        self._cache.drop(key)


def _read(file: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return file.read_bytes()
    return None


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
    """Files below a local root, those that are being staged left out."""
    for directory, names, files in os.walk(root / prefix):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in files:
            path = Path(directory, name)
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                yield path.relative_to(root).as_posix(), Entry(found.st_size, found.st_mtime, "")
