"""Documents from text sources: files, directories, and the standard library of the running Python."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from puzzle_core.errors import DataError

STDLIB = "python-stdlib"


_STDLIB_SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


_STDLIB_SPLITS = {f"{STDLIB}:train": False, f"{STDLIB}:held-out": True}


class Document(NamedTuple):
    """One text with the name it is known by in error messages."""

    name: str
    text: str


def read_documents(sources: Iterable[str]) -> list[Document]:
    """Read every document of every source, in a stable order.

    A source is `python-stdlib:train`, `python-stdlib:held-out`, a text file (one document), a `.json` list of
    strings, a `.jsonl` or `.jsonl.gz` with one string or one object with a `text` per line, or a directory of these.

    Raises:
        DataError: a source is missing, empty, not UTF-8, not of a known form, or holds half a surrogate pair.
    """
    documents: list[Document] = []
    for source in sources:
        found = [document for document in _read_source(source) if document.text.strip()]
        if not found:
            raise DataError(f"text source {source!r} holds no text: give a file with at least one non-empty document")
        documents += found
    return documents


def source_files(sources: Iterable[str]) -> list[Path]:
    """The files that `read_documents` reads, in its order.

    Raises:
        DataError: a source is missing.
    """
    return [file for source in sources for file in _files_of(source)]


def digest_documents(documents: Iterable[Document]) -> str:
    """Hex digest of the texts and their order; names do not count."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()[:40]


def stdlib_documents(held_out: bool, include_tests: bool = False) -> Iterator[Document]:
    """Modules of the running interpreter's standard library; one module in eight is held out, chosen by its name.

    Test modules are left out unless asked for, since some distributions do not ship them, and so are the code-page
    tables of `encodings`, which are not prose of any kind.
    """
    root = _stdlib()
    for path in _stdlib_files(held_out, include_tests):
        try:
            yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a few test inputs are written in other encodings on purpose


def is_held_out(name: str) -> bool:
    """Whether a standard-library module belongs to the held-out eighth."""
    return hashlib.sha256(name.encode()).digest()[0] % 8 == 0


def _read_source(source: str) -> Iterator[Document]:
    if source in _STDLIB_SPLITS:
        yield from stdlib_documents(held_out=_STDLIB_SPLITS[source])
        return
    for file in _files_of(source):
        yield from _read_file(file)


def _files_of(source: str) -> list[Path]:
    if source in _STDLIB_SPLITS:
        return _stdlib_files(held_out=_STDLIB_SPLITS[source])
    if source.startswith(STDLIB):
        raise DataError(f"unknown text source {source!r}: say {' or '.join(map(repr, _STDLIB_SPLITS))}")
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if path.is_file():
        return [path]
    raise DataError(f"text source {source!r} does not exist: give a file, a directory or '{STDLIB}:train'")


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files(held_out: bool, include_tests: bool = False) -> list[Path]:
    skipped = _STDLIB_SKIPPED - ({"test", "tests", "idle_test"} if include_tests else set())
    root, found = _stdlib(), list[Path]()
    for directory, within, names in os.walk(root):
        within[:] = [name for name in within if name not in skipped]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if is_held_out(path.relative_to(root).as_posix()) == held_out)


def _read_file(path: Path) -> Iterator[Document]:
    content = path.read_bytes()
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}): replace it") from error
        suffixes.pop()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}): convert it, for instance "
            f"with `iconv -t utf-8`"
        ) from error
    try:
        if suffixes[-1:] == [".json"]:
            items = json.loads(text) if text.strip() else []
            if not isinstance(items, list):
                raise DataError(f"{path} holds a JSON {type(items).__name__}: a list of strings is wanted")
        elif suffixes[-1:] == [".jsonl"]:
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            items = [text]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    for number, item in enumerate(items):
        body = item.get("text") if isinstance(item, dict) else item
        if not isinstance(body, str):
            raise DataError(f"{path}, entry {number}: neither a string nor an object with a string under 'text'")
        try:
            body.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}, entry {number}: character {error.start} is \\u{ord(body[error.start]):04x}, half of a "
                f"surrogate pair and no text: repair or drop this entry"
            ) from error
        yield Document(f"{path}#{number}", body)
