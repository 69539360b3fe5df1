"""Digests of the parent and of texts, kept in scratch: a file is read again only after its size or times changed.

What reads the files counts, too: another transformers may see another config, and other code of this project other
documents.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from puzzle_core.data import check_enough
from puzzle_core.errors import DataError, ParentError, PuzzleError
from puzzle_core.model.parent import Parent
from puzzle_core.records import digest_file, write_text_atomic
from puzzle_core.text_sources import Texts, check_disjoint, digest_documents, read_texts, source_files
from puzzle_core.work import TokensWork
from tasks.runtime.software import software

Signature = tuple[tuple[str, tuple[int, int, int, int] | None], ...]
"""By file: size in bytes, time of modification and of change in ns, and inode; none of a file that is not there."""


def signature_of(files: list[Path]) -> Signature:
    """What changes whenever the content of one of these files does, and is read without reading them.

    The time of change is in it because a copy may set the time of modification.
    """
    return tuple((str(file), _status(file)) for file in files)


def parent_digest(parent: Parent, scratch: Path) -> str:
    """Digest of the parent; computing it checks every weight.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        ParentError: a file changes meanwhile.
    """

    def compute() -> str:
        parent.check_finite()
        return parent.digest

    return _cached(scratch / "parents", parent.weight_files, compute, ParentError)


def file_digest(file: Path, scratch: Path) -> str:
    """Hex SHA-256 of the content of a parent's file.

    Raises:
        ParentError: the file changes meanwhile.
    """
    return _cached(scratch / "parents", [file], lambda: digest_file(file), ParentError, "content")


def texts_digest(texts: Texts, scratch: Path) -> str:
    """Digest of these texts, in their order.

    Raises:
        DataError: as `read_texts`, or a file changes meanwhile.
    """
    files = source_files(texts.sources)
    side = "held-out" if texts.held_out else "trained"
    purpose = f"digest of the {side} documents of {texts.held_out_share:g}" if texts.held_out_share else "digest"
    return _cached(scratch / "texts", files, lambda: digest_documents(read_texts(texts)), DataError, purpose)


def named_chat(texts: Texts, scratch: Path) -> str:
    """The name of a document of these texts that is a chat; empty if none is.

    Raises:
        DataError: as `read_texts`, or a file changes meanwhile.
    """

    def compute() -> str:
        return next((document.name for document in read_texts(texts) if document.is_chat), "")

    side = "held-out" if texts.held_out else "trained"
    purpose = f"a chat among the {side} documents of {texts.held_out_share}"
    return _cached(scratch / "texts", source_files(texts.sources), compute, DataError, purpose)


def check_texts_disjoint(train: Texts, held_out: Texts, scratch: Path) -> None:
    """Refuse held-out texts that are among the texts for training.

    Raises:
        DataError: names the first document that is in both, or a file changes meanwhile.
    """

    def compute() -> str:
        check_disjoint(read_texts(train), read_texts(held_out))
        return "disjoint"

    if train.held_out_share:
        return  # a split by document
    train_files, held_out_files = source_files(train.sources), source_files(held_out.sources)
    purpose = f"the first {len(train_files)} files are for training"
    _cached(scratch / "texts", [*train_files, *held_out_files], compute, DataError, purpose)


def check_texts_enough(work: TokensWork, texts: Texts, parent: Parent, scratch: Path) -> None:
    """Refuse texts that hold fewer tokens than a split and those before it need.

    Raises:
        DataError: names the first split that gets too few, or a file changes meanwhile.
    """

    def compute() -> str:
        check_enough(work, read_texts(texts), parent.tokenizer())
        return "enough"

    _cached(scratch / "texts", source_files(texts.sources), compute, DataError, f"enough for {work.key}")


def _cached(
    directory: Path, files: list[Path], compute: Callable[[], str], error: type[PuzzleError], purpose: str = "digest"
) -> str:
    """The digest of these files, computed unless it is known for their signature and for what reads them."""
    signature, own = signature_of(files), software()
    reader = own.versions["transformers"] if error is ParentError else own.code
    name = hashlib.sha256(json.dumps([purpose, reader, signature]).encode()).hexdigest()[:16]
    cached = directory / f"{name}.digest"
    if not cached.exists():
        digest = compute()
        if signature_of(files) != signature:
            raise error(f"{files[0].parent}: files change while they are read: run again once they are whole")
        write_text_atomic(cached, digest)
    return cached.read_text()


def _status(file: Path) -> tuple[int, int, int, int] | None:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
