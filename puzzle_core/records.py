"""Frozen records: the only values that cross stage boundaries (DESIGN rules 1 and 3).

A record refuses unknown keys and is immutable. Records of equal content have equal digests on every machine.
The JSON file is written atomically: a reader sees the whole file or no file.
"""

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from puzzle_core.credentials import refuse_in_schema
from puzzle_core.errors import ArtifactError, StorageError


class Record(BaseModel):
    """Base of every spec part, stage input and stage result."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=refuse_in_schema)

    def canonical_json(self) -> str:
        """The record as JSON with sorted keys and no spaces: equal content gives equal text."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Hex digest (40 digits) of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:40]

    def write(self, path: Path) -> None:
        """Write as indented JSON, atomically."""
        write_text_atomic(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` made.

        Raises:
            ArtifactError: the file is missing or does not hold this record.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} does not exist, so the artifact is incomplete; run the flow again") from error
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} does not hold a {cls.__name__} and is not text: it is damaged") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ArtifactError(
                f"{path} does not hold a {cls.__name__} ({error.error_count()} errors, the first in {place}: "
                f"{first['msg']}): it is damaged, or another version wrote it; run the flow again"
            ) from error


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values and does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: after a crash, the path holds the old file or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Make a directory for what a command will write, before its work.

    Raises:
        StorageError: it is a file or lies below one, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"{path} should be a directory, and is or lies below a file") from error
    except OSError as error:
        raise StorageError(f"cannot make the directory {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write into the directory {path}: no permission")


def digest_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(files: Iterable[Path], root: Path, remark: str = "") -> str:
    """Hex digest of files in their order: of their names below `root`, of their contents, and of the remark."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()} {digest_file(file)}\n".encode())
    digest.update(remark.encode())
    return digest.hexdigest()[:40]


class Work(Record):
    """The complete input of a stage: its part of the spec and the keys of its inputs.

    Equal work has an equal key on every machine. `version` is the version of the stage's numerics. Raise it when a
    change of code changes results; the new version does not use artifacts of older versions.
    """

    stage: ClassVar[str]
    version: ClassVar[int]

    @functools.cached_property
    def key(self) -> str:
        """The artifact's key, `stage/vN/digest`."""
        return f"{self.stage}/v{self.version}/{self.digest()}"

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with changes and a new key."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("key", None)
        return copied
