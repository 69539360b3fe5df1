"""Documents from text sources: files, directories, and the standard library of the running Python."""

import bz2
import contextlib
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.errors import DataError
from puzzle_core.records import Record

log = logging.getLogger(__name__)
STDLIB = "python-stdlib"
_STDLIB_SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
_STDLIB_SPLITS = {f"{STDLIB}:train": False, f"{STDLIB}:held-out": True}
_JSON_LINES = (".jsonl", ".ndjson", ".jl")
_DATA = (".json", ".parquet", *_JSON_LINES)
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_COMPRESSION = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
_NOT_TEXT = {
    b"PAR1": "is a Parquet file: give it the ending .parquet",
    b"\x1f\x8b": "is compressed by gzip: give it the ending .gz",
    b"BZh": "is compressed by bzip2: give it the ending .bz2",
    b"\xfd7zXZ": "is compressed by xz: give it the ending .xz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstandard, which is not read here: decompress it (`unzstd`)",
    b"PK\x03\x04": "is a ZIP archive, which is not read here: unpack it",
    b"ARROW1": "is an Arrow file, which is not read here: write the data set as Parquet or JSON Lines",
    b"\xff\xff\xff\xff": "is an Arrow stream, which is not read here: write the data set as Parquet or JSON Lines",
    b"%PDF": "is a PDF document, which is not read here: extract its text",
}
"""What a file is that starts with these bytes, and what to do."""
_HEAD_BYTES = 4096
_NO_TEXT = re.compile(r"(dataset_infos?|state|dataset_dict)\.json|readme(\.\w+)?|licen[cs]e(\.\w+)?", re.IGNORECASE)
"""Files that describe a data set. They are skipped if the directory also has data files."""
_LOOK_CHARACTERS = 1 << 20


class Document(NamedTuple):
    """One text and its name in error messages."""

    name: str
    text: str


class Texts(Record):
    """Text sources, whole or one side of a split of their documents.

    Attributes:
        held_out_share: share of the documents that is held out; None for the whole sources.
        held_out: whether this is the side that is held out.
    """

    sources: tuple[str, ...]
    held_out_share: float | None = None
    held_out: bool = False


def read_texts(texts: Texts) -> list[Document]:
    """The documents of these texts, in the order of their sources.

    A split is by the digests of the documents: the first `held_out_share` of the different ones is held out, one at
    least. Documents of equal text are on one side.

    Raises:
        DataError: as `read_documents`, or there are fewer than two different documents to split.
    """
    documents = read_documents(texts.sources)
    if texts.held_out_share is None:
        return documents
    digests = [_digest(document) for document in documents]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise DataError(
            f"data.held_out_share splits the texts by document, and {', '.join(texts.sources)} hold one document: give "
            "more documents (JSON Lines, a directory), or other texts as data.held_out_texts"
        )
    count = min(max(round(texts.held_out_share * len(distinct)), 1), len(distinct) - 1)
    held_out = set(distinct[:count])
    return [
        document for document, digest in zip(documents, digests, strict=True) if (digest in held_out) == texts.held_out
    ]


def read_documents(sources: Iterable[str]) -> list[Document]:
    """Read every document of every source, in a stable order.

    A source is `python-stdlib:train`, `python-stdlib:held-out`, a text file (one document), a JSON list of strings or
    of objects with a `text`, JSON Lines of these under any ending, a Parquet file with a column `text`, one of these
    compressed by gzip, bzip2 or xz, or a directory of them. A byte order mark is skipped.

    Raises:
        DataError: a source is missing, empty, not UTF-8, of an unknown format, or holds half a surrogate pair.
    """
    documents: list[Document] = []
    for source in sources:
        not_blank = [document for document in _read_source(source) if document.text.strip()]
        if not not_blank:
            raise DataError(f"text source {source!r} holds no text: give a file with at least one non-empty document")
        documents += not_blank
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


def check_disjoint(train: Iterable[Document], held_out: Iterable[Document]) -> None:
    """Refuse texts that are in both training and held-out data; leading and trailing whitespace is ignored.

    Raises:
        DataError: names the first document that is in both.
    """
    trained = {_digest(document): document.name for document in train}
    for document in held_out:
        if same := trained.get(_digest(document)):
            raise DataError(
                f"{document.name} of data.held_out_texts is also in data.train_texts ({same}), so scores and "
                "evaluation would see what was trained on: leave it out of one of the two, or give data.held_out_share "
                "instead of data.held_out_texts, which splits data.train_texts by document"
            )


def _digest(document: Document) -> bytes:
    """Equal for texts that differ in leading and trailing whitespace alone."""
    return hashlib.sha256(document.text.strip().encode()).digest()


def stdlib_documents(held_out: bool, include_tests: bool = False) -> Iterator[Document]:
    """Modules of the running interpreter's standard library; one module in eight is held out, chosen by its name.

    Test modules are skipped by default, because some distributions do not ship them. The code-page tables of
    `encodings` are always skipped.
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
        raise DataError(f"unknown text source {source!r}: use {' or '.join(map(repr, _STDLIB_SPLITS))}")
    path = Path(source)
    if path.is_dir():
        return _files_with_text(path)
    if path.is_file():
        return [path]
    raise DataError(f"text source {source!r} does not exist: give a file, a directory or '{STDLIB}:train'")


def _files_with_text(directory: Path) -> list[Path]:
    """The files of a directory, without hidden files and files that only describe a data set."""
    parts = ((file, file.relative_to(directory).parts) for file in sorted(directory.rglob("*")) if file.is_file())
    files = [file for file, names in parts if not any(name.startswith(".") for name in names)]
    if not any({*file.suffixes} & {*_DATA} and not _NO_TEXT.fullmatch(file.name) for file in files):
        return files
    left_out = [file for file in files if _NO_TEXT.fullmatch(file.name)]
    if left_out:
        log.info("%s: %s hold no text and are left out", directory, ", ".join(file.name for file in left_out))
    return [file for file in files if file not in left_out]


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files(held_out: bool, include_tests: bool = False) -> list[Path]:
    skipped = _STDLIB_SKIPPED - ({"test", "tests", "idle_test"} if include_tests else set())
    root, modules = _stdlib(), list[Path]()
    for directory, within, names in os.walk(root):
        within[:] = [name for name in within if name not in skipped]
        modules += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(path for path in modules if is_held_out(path.relative_to(root).as_posix()) == held_out)


def _read_file(path: Path) -> Iterator[Document]:
    items: Iterable[Any]
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        items = _parquet_texts(path)
    else:
        text = read_text(path)
        items = _json_items(path, text, whole=".json" in suffixes[-2:], lines={*_JSON_LINES} & {*suffixes[-2:]})
    for number, item in enumerate(items):
        body = item.get("text") if isinstance(item, dict) else item
        if not isinstance(body, str):
            raise DataError(
                f"{path}, entry {number}: neither a string nor an object with a string under 'text'; name "
                "the files that hold text, or write it under 'text'"
            )
        try:
            body.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}, entry {number}: character {error.start} is \\u{ord(body[error.start]):04x}, half of a "
                f"surrogate pair and no text: repair or drop this entry"
            ) from error
        yield Document(f"{path}#{number}", body)


def read_text(path: Path) -> str:
    """The text of a file, decompressed if its suffix names a compression.

    Raises:
        DataError: the file is not whole, or not UTF-8.
    """
    return _text_of(path, _plain_bytes(path))


def _plain_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed if its suffix names a compression."""
    suffix = path.suffix.lower()
    content = path.read_bytes()
    if suffix not in _DECOMPRESS:
        return content
    try:
        return _DECOMPRESS[suffix](content)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is not a whole {_COMPRESSION[suffix]} file ({error}): replace it") from error


def _text_of(path: Path, content: bytes) -> str:
    """UTF-8 text without a leading byte order mark."""
    for start, what in _NOT_TEXT.items():
        if content.startswith(start):
            raise DataError(f"{path} {what}")
    if b"\0" in content[:_HEAD_BYTES]:
        raise DataError(
            f"{path} has NUL bytes, so it is no UTF-8 text: unpack it if it is an archive, convert it if it is UTF-16 "
            "(`iconv -f utf-16 -t utf-8`), or leave it out if it holds no text"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}): convert it, for instance "
            f"with `iconv -t utf-8`, or leave it out if it holds no text"
        ) from error


def _json_items(path: Path, text: str, whole: bool, lines: Collection[str]) -> list[Any]:
    """The entries of a text file: a JSON list, JSON Lines under any suffix, or the whole text."""
    if not whole and not lines and not _looks_like_json_lines(text):
        return [text]
    if not text.strip():
        return []
    try:
        if whole:
            with contextlib.suppress(json.JSONDecodeError):
                items = json.loads(text)
                if isinstance(items, list):
                    return items
                if isinstance(items, dict) and isinstance(items.get("text"), str):
                    return [items]
                raise DataError(
                    f"{path} holds a JSON {type(items).__name__}: a list of strings, a list of objects with a string "
                    "under 'text', or one such object per line is wanted; leave the file out if it holds no text"
                )
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON, nor JSON Lines ({error})") from error


def _looks_like_json_lines(text: str) -> bool:
    """Whether the first two lines are JSON objects with a string under `text`."""
    first = [line for line in text[:_LOOK_CHARACTERS].lstrip().split("\n", 2)[:2] if line.strip()]
    for line in first if text.lstrip().startswith("{") else ():
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            return False
        if not (isinstance(item, dict) and isinstance(item.get("text"), str)):
            return False
    return bool(first) and text.lstrip().startswith("{")


def _parquet_texts(path: Path) -> Iterator[Any]:
    """The column `text` of a Parquet file, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise DataError(
                    f"{path} is a Parquet file without a column 'text' (it has {', '.join(columns) or 'none'}): "
                    "rename the column that holds the text"
                )
            for batch in file.iter_batches(columns=["text"]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}): replace it") from error
