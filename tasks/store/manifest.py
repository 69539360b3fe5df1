"""The manifest of an artifact, `record.json`, and the form of artifact keys."""

import hashlib
import re
from pathlib import PurePosixPath
from typing import Any

from pydantic import model_validator

from puzzle_core.errors import SpecError
from puzzle_core.records import Record, canonical_json
from tasks.store.origin import Origin

MANIFEST = "record.json"
KEY = re.compile(r"[\w-]+/v\d+/[0-9a-f]{40}")


class StoredFile(Record):
    """Size and SHA-256 of one file of an artifact."""

    size_bytes: int
    sha256: str


class Manifest(Record):
    """`record.json`: the stage's work and record, the artifact's files, and which run made it when.

    `place` is the directory of the files below the artifact's: empty in a local store, named by content in a bucket.
    `origin` says what made the artifact; older manifests lack it.
    """

    key: str
    work: dict[str, Any]
    record: dict[str, Any]
    files: dict[str, StoredFile]
    made_by: str
    made_at: str
    place: str = ""
    origin: Origin | None = None

    @model_validator(mode="after")
    def _stays_inside(self) -> "Manifest":
        for path in (self.key, self.place, *self.files):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
                raise ValueError(f"{path!r} leaves the artifact's directory")
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size_bytes for entry in self.files.values())


def check_key(key: str) -> str:
    """Return the key.

    Raises:
        SpecError: it does not have the form of a key.
    """
    if not KEY.fullmatch(key):
        raise SpecError(f"{key!r} is no key of an artifact: give stage/vN/digest, as `puzzle store ls` prints it")
    return key


def content_name(files: dict[str, StoredFile]) -> str:
    """A name that is equal for files of equal names and content."""
    listing = canonical_json({name: entry.sha256 for name, entry in files.items()})
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
