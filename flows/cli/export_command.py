"""`puzzle export`: a child as a serving engine reads it."""

import contextlib
import logging
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from flows.cli.arguments import MLFLOW_URI, STORE, Child, MlflowUri, NewDirectory, StoreUrl, check_name
from puzzle_core.engines import GgufType, obstacles
from puzzle_core.errors import SpecError
from puzzle_core.spec import RuntimeSpec

if TYPE_CHECKING:
    from puzzle_core.export.card import Provenance
    from puzzle_core.export.hf import HfDtype, Widths
    from puzzle_core.export.source import ExportRecord
    from tasks.store.store import Store

HF_DTYPES: "dict[GgufType, HfDtype]" = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

log = logging.getLogger("puzzle")


def export(
    child: Child,
    /,
    *,
    format: Annotated[Literal["hf", "gguf"], Parameter(help="hf: DeciLM directory; gguf: llama.cpp.")],
    out: Annotated[NewDirectory, Parameter(help="New directory for the files.")],
    name: Annotated[
        str | None, Parameter(validator=check_name, help="The model's name in its files [default: the name of --out].")
    ] = None,
    dtype: Annotated[
        GgufType | None, Parameter(help="Type of the weights [default: the checkpoint's]; q8_0: gguf only.")
    ] = None,
    widths: Annotated[
        Literal["grid", "pad", "any"],
        Parameter(
            help="hf, FFN widths that are not multiples of 256: refuse them (grid), pad them with zero channels (pad), "
            "or write them as they are (any), which vLLM and transformers read."
        ),
    ] = "grid",
    store: StoreUrl = STORE,
    mlflow: Annotated[
        MlflowUri,
        Parameter(help="MLflow tracking URI; the export of a key is recorded there, if MLflow has the child."),
    ] = MLFLOW_URI,
) -> None:
    """Write a child for serving engines.

    Raises:
        SpecError: a quantised type for a Hugging Face directory, or CHILD is neither a directory nor a key.
        ExportError: the format cannot hold the child.
    """
    if format == "hf" and dtype == "q8_0":
        raise SpecError("--dtype q8_0 is of --format gguf: engines quantise a Hugging Face directory themselves")
    model_name = name or out.resolve().name
    directory, opened, key = open_child(child, store)
    provenance = None
    if opened:
        from tasks.store.provenance import stored_provenance

        provenance = stored_provenance(opened, key)
    with new_directory(out) as staged:
        if format == "hf":
            record = _write_hf(directory, staged, model_name, widths, dtype, provenance)
        else:
            record = _write_gguf(directory, staged, model_name, dtype)
    for engine, reasons in obstacles(record.architecture, format).items():
        if reasons:
            log.warning("%s will not run it: it %s", engine, "; it ".join(reasons))
    for remark in record.remarks:
        log.info("%s", remark)
    summary = f"{record.format} in {record.dtype}, {record.parameters:,} parameters, {record.bytes / 2**20:,.1f} MiB"
    if provenance:
        _track(mlflow, provenance.key, out, record, summary)
    sys.stdout.write(f"{summary}: {out}\n")


def open_child(child: str, store: str) -> "tuple[Path, Store | None, str]":
    """The child's directory, and its store and key where `child` is a key.

    Raises:
        SpecError: it is neither a directory nor a key.
        ArtifactError: the store has no such artifact.
    """
    if Path(child).is_dir():
        return Path(child), None, ""
    from tasks.store.manifest import check_key
    from tasks.store.store import Store

    try:
        key = check_key(child)
    except SpecError as error:
        raise SpecError(f"{child!r} is neither a directory here nor a key of a child like gkd/v1/...") from error
    opened = Store.of(RuntimeSpec(store=store))
    return opened.fetch(key), opened, key


def _write_hf(
    directory: Path,
    staged: Path,
    name: str,
    widths: "Widths",
    dtype: GgufType | None,
    provenance: "Provenance | None",
) -> "ExportRecord":
    from puzzle_core.export.card import model_card
    from puzzle_core.export.hf import export_hf
    from puzzle_core.export.source import Source

    source = Source(directory)
    record = export_hf(source, staged, widths=widths, dtype=HF_DTYPES[dtype] if dtype else None)
    (staged / "README.md").write_text(model_card(name, source, record, provenance))
    return record


def _write_gguf(directory: Path, staged: Path, name: str, dtype: GgufType | None) -> "ExportRecord":
    from puzzle_core.export.gguf_file import as_stored, export_gguf
    from puzzle_core.export.source import Source

    source = Source(directory)
    kind = dtype or as_stored(source)
    return export_gguf(source, staged / f"{name}-{kind}.gguf", kind, name=name)


def _track(uri: str, child: str, out: Path, record: "ExportRecord", summary: str) -> None:
    """Record the export in MLflow if it has the child; a failure of MLflow is a warning, as the files are written."""
    from tasks.tracking.place import tracking_uri

    uri = tracking_uri(uri)
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():
        return
    from puzzle_core.credentials import redacted
    from tasks.tracking.lineage import record_export

    about = record.model_dump(include={"format", "dtype", "parameters", "bytes"})
    try:
        recorded = record_export(uri, RuntimeSpec().scratch, child, out, about, summary)
    except Exception as error:
        log.warning("the export is not recorded: MLflow does not respond (%s)", redacted(str(error)))
        return
    if not recorded:
        log.info("the export is not recorded: MLflow does not have %s", child)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out`, renamed to `out` when the block succeeds and removed when it fails."""
    staged = out.resolve().with_name(f".{out.resolve().name}.{uuid.uuid4().hex}")
    staged.mkdir(parents=True)
    try:
        yield staged
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
