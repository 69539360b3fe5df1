"""Documents from text sources: files, directories, and the standard library of the running Python."""

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from puzzle_core.errors import DataError
from puzzle_core.records import Record
from puzzle_core.text_files import DATA_SUFFIXES, Document, read_file

log = logging.getLogger(__name__)
STDLIB = "python-stdlib"
_STDLIB_SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
_STDLIB_SPLITS = {f"{STDLIB}:train": False, f"{STDLIB}:held-out": True}
_NO_TEXT = re.compile(r"(dataset_infos?|state|dataset_dict)\.json|readme(\.\w+)?|licen[cs]e(\.\w+)?", re.IGNORECASE)
"""Files that describe a data set. They are skipped if the directory also has data files."""


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
    of objects with a `text` or with the `messages` of a chat, JSON Lines of these under any ending, a Parquet file with
    a column `text` or `messages`, one of these compressed by gzip, bzip2 or xz, or a directory of them. A byte order
    mark is skipped.

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
    """Hex digest of the texts and their order; names do not count. A chat has another one than its messages as text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest() + b"chat" * document.is_chat)
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
        yield from read_file(file)


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
    if not any({*file.suffixes} & {*DATA_SUFFIXES} and not _NO_TEXT.fullmatch(file.name) for file in files):
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
