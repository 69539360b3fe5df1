"""Digests of the parent and of texts, kept in scratch: a file is read again only after its size or time changed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from puzzle_core.model.parent import Parent
from puzzle_core.records import write_text_atomic
from puzzle_core.text_sources import check_disjoint, digest_documents, read_documents, source_files


def parent_digest(parent: Parent, scratch: Path) -> str:
    """Digest of the parent; computing it checks every weight.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """

    def compute() -> str:
        parent.check_finite()
        return parent.digest

    return _cached(scratch / "parents", [parent.directory / "config.json", *parent.checkpoint.files], compute)


def texts_digest(sources: tuple[str, ...], scratch: Path) -> str:
    """Digest of the texts in these sources, in their order.

    Raises:
        DataError: as `read_documents`.
    """
    return _cached(scratch / "texts", source_files(sources), lambda: digest_documents(read_documents(sources)))


def check_texts_disjoint(train: tuple[str, ...], held_out: tuple[str, ...], scratch: Path) -> None:
    """Refuse held-out texts that are among the texts for training.

    Raises:
        DataError: names the first document that is in both.
    """

    def compute() -> str:
        check_disjoint(read_documents(train), read_documents(held_out))
        return "disjoint"

    train_files, held_out_files = source_files(train), source_files(held_out)
    purpose = f"the first {len(train_files)} files are for training"
    _cached(scratch / "texts", [*train_files, *held_out_files], compute, purpose)


def _cached(directory: Path, files: list[Path], compute: Callable[[], str], purpose: str = "digest") -> str:
    """The digest of these files, computed unless it is known for their paths, sizes and modification times."""
    signature = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = hashlib.sha256(json.dumps([purpose, signature]).encode()).hexdigest()[:16]
    cached = directory / f"{name}.digest"
    if not cached.exists():
        write_text_atomic(cached, compute())
    return cached.read_text()
