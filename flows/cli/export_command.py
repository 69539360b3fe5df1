"""`puzzle export`: a child as a serving engine reads it."""

import argparse
import contextlib
import logging
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puzzle_core.errors import SpecError
from puzzle_core.spec import RuntimeSpec

EXPORT_HELP = "write a child as a serving engine reads it: a Hugging Face directory (DeciLM) or a GGUF file"
FORMATS = ("hf", "gguf")
HF_DTYPES: dict[str, Any] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
WIDTHS = ("grid", "pad", "any")

log = logging.getLogger("puzzle")


def add_export_options(export: argparse.ArgumentParser) -> None:
    """Give `puzzle export` its options."""
    export.add_argument("child", metavar="CHILD", help="directory of a child (or parent), or a key in --store")
    export.add_argument("--format", choices=FORMATS, required=True, help="hf: DeciLM directory; gguf: llama.cpp")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; must not exist")
    export.add_argument("--name", help="what the model calls itself (default the name of --out)")
    export.add_argument(
        "--dtype", choices=GGUF_TYPES, help="type of the weights (default as they are; q8_0: gguf only)"
    )
    export.add_argument(
        "--widths",
        choices=WIDTHS,
        default="grid",
        help="hf, FFN widths that are no multiple of 256: refused (grid), padded with zero channels (pad), or written "
        "as they are (any), which vLLM and transformers read (default %(default)s)",
    )
    export.add_argument("--store", default=RuntimeSpec().store, help="artifact store (default %(default)s)")
    export.add_argument(
        "--mlflow",
        default=RuntimeSpec().mlflow_uri,
        metavar="URI",
        help="tracking URI where the export of a key is noted, if the child is known there (default %(default)s)",
    )


def export(options: Any) -> None:
    """Run `puzzle export`."""
    if options.format == "hf" and options.dtype == "q8_0":
        raise SpecError("--dtype q8_0 is of --format gguf: engines quantise a Hugging Face directory themselves")
    name = options.name or options.out.resolve().name
    if Path(name).name != name or "\\" in name:
        raise SpecError(f"--name {name!r} is a path: say what the model is called, and where it goes with --out")
    directory, store, key = open_child(options.child, options.store)
    provenance = None
    if store:
        from tasks.store.provenance import stored_provenance

        provenance = stored_provenance(store, key)
    with new_directory(options.out) as staged:
        written = _write_hf if options.format == "hf" else _write_gguf
        record = written(directory, provenance, staged, name, options)
    for remark in record.remarks:
        log.info("%s", remark)
    size = f"{record.parameters:,} parameters, {record.bytes / 2**20:,.1f} MiB"
    if provenance:
        _note(options, provenance.key, record, f"{record.format} in {record.dtype}, {size}")
    sys.stdout.write(f"{record.format} in {record.dtype}, {size}: {options.out}\n")


def _note(options: Any, child: str, record: Any, said: str) -> None:
    """Note the export in MLflow, where there is one that knows the child; what goes wrong with that is only said."""
    database = options.mlflow.removeprefix("sqlite:///")
    if database != options.mlflow and not Path(database).is_file():
        return
    from tasks.tracking.lineage import record_export
    from tasks.tracking.outbox import without_credentials

    about = record.model_dump(include={"format", "dtype", "parameters", "bytes"})
    try:
        known = record_export(options.mlflow, RuntimeSpec().scratch, child, options.out, about, said)
    except Exception as error:
        log.warning("the export is not noted in MLflow, which does not answer: %s", without_credentials(str(error)))
        return
    if not known:
        log.info("the export is not noted: MLflow does not know %s", child)


def _write_hf(directory: Path, provenance: Any, staged: Path, name: str, options: Any) -> Any:
    from puzzle_core.engines import obstacles
    from puzzle_core.export.card import model_card
    from puzzle_core.export.hf import export_hf
    from puzzle_core.export.source import Source

    source = Source(directory)
    record = export_hf(source, staged, widths=options.widths, dtype=HF_DTYPES.get(options.dtype))
    (staged / "README.md").write_text(model_card(name, source, record, provenance))
    for engine, reasons in obstacles(record.architecture).items():
        if reasons:
            log.warning("%s will not run it: it %s", engine, "; it ".join(reasons))
    return record


def _write_gguf(directory: Path, _: Any, staged: Path, name: str, options: Any) -> Any:
    from puzzle_core.export.gguf_file import as_stored, export_gguf
    from puzzle_core.export.source import Source

    source = Source(directory)
    kind = options.dtype or as_stored(source)
    return export_gguf(source, staged / f"{name}-{kind}.gguf", kind, name=name)


def open_child(child: str, location: str) -> tuple[Path, Any, str]:
    """The child's directory, and its store and key where it is one of a store.

    Raises:
        SpecError: it is neither a directory nor a key.
    """
    if Path(child).is_dir():
        return Path(child), None, ""
    from tasks.store.manifest import check_key
    from tasks.store.store import Store

    try:
        key = check_key(child)
    except SpecError as error:
        raise SpecError(f"{child!r} is neither a directory here nor a key of a child like gkd/v1/...") from error
    store = Store.of(RuntimeSpec(store=location))
    return store.fetch(key), store, key


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes it when all went well, so that it is whole or not there."""
    if out.exists():
        raise SpecError(f"--out {out} exists: name a new directory, or remove it")
    staged = out.resolve().with_name(f".{out.resolve().name}.{uuid.uuid4().hex}")
    staged.mkdir(parents=True)
    try:
        yield staged
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
