"""What an artifact's record says: `record.json`, the keys of artifacts, and the names of their files."""

import hashlib
import re
from pathlib import PurePosixPath
from typing import Any

from pydantic import model_validator

from puzzle_core.errors import SpecError
from puzzle_core.records import Record, canonical_json

MANIFEST = "record.json"
KEY = re.compile(r"[\w-]+/v\d+/[0-9a-f]{40}")


class StoredFile(Record):
    """Size and SHA-256 of one file of an artifact."""

    size_bytes: int
    sha256: str


class Manifest(Record):
    """`record.json`: what was asked, what came out, which files, and who made it when.

    `place` is the directory of the files below the artifact's: none in a local store, named by content in a bucket.
    """

    key: str
    work: dict[str, Any]
    record: dict[str, Any]
    files: dict[str, StoredFile]
    made_by: str
    made_at: str
    place: str = ""

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
    """The key, if it is one.

    Raises:
        SpecError: it is none.
    """
    if not KEY.fullmatch(key):
        raise SpecError(f"{key!r} is no key of an artifact: say stage/vN/digest, as `puzzle store ls STAGE` prints it")
    return key


def name_of(files: dict[str, StoredFile]) -> str:
    """A name that is equal for equal files."""
    listing = canonical_json({name: entry.sha256 for name, entry in files.items()})
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
