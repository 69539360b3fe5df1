"""Reads scores and costs from files: CSV, Parquet or JSON (docs/formats.md). No torch, no Prefect.

Cells are taken as written. A reader that guesses types makes numbers, dates or missing values of names that look like
them.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.errors import CoverageError, NonFiniteError, SpecError, reason
from puzzle_core.search.tables import OUTSIDE, CostRow, CostTable, Option, ScoreTable

MOST_LAYERS = 10_000
LARGEST, LEAST = 1e30, 1e-30
"""Numbers of a table lie between these magnitudes, or are 0: sums over layers stay finite, differences stay visible."""
SCORE_KEYS = ("layer", "attention", "ffn", "span")
COST_KEYS = ("scenario", "batch_size", "layer", "attention", "ffn", "subblock", "variant")


class _Table(NamedTuple):
    """The columns of a file, and every row with its place for messages."""

    columns: list[str]
    rows: list[tuple[str, dict[str, Any]]]


def read_scores(
    path: Path,
    column: str | None = None,
    maximise: bool = False,
    parent: BlockVariant | None = None,
    distance: bool = False,
) -> ScoreTable:
    """A score table: columns `layer`, `attention`, `ffn`, the score, and optionally `span`.

    Args:
        column: the score's name; required if the file has several numeric columns and none is named `score`.
        maximise: larger scores are better. The table negates them.
        parent: the parent's own block; by default the widest attention with the widest FFN.
        distance: the score is a distance to the parent, such as a KL or an increase of the loss. The parent's own block
            then scores 0 in layers without a row for it. Any other score needs these rows.

    Raises:
        SpecError, CoverageError, NonFiniteError: the file is not valid; names the row and the column.
    """
    if maximise and distance:
        raise SpecError("a distance is better where it is smaller: give --distance or --maximise, not both")
    table = _read(path)
    _need(path, table, ("layer", "attention", "ffn"))
    column = _score_column(path, table, column)
    rows = table.rows
    blocks = [_block(place, row) for place, row in rows]
    count = max((_integer(place, row, "layer") for place, row in rows), default=-1) + 1
    if count > MOST_LAYERS:
        raise SpecError(f"{path} has a layer {count - 1:,}: layers are counted from 0, up to {MOST_LAYERS - 1:,}")
    layers: list[dict[Option, float]] = [{} for _ in range(count)]
    seen: dict[tuple[int, Option], str] = {}
    for (place, row), block in zip(rows, blocks, strict=True):
        layer, option = _integer(place, row, "layer"), Option(block, _integer(place, row, "span", 1))
        if (layer, option) in seen:
            raise SpecError(f"{place}: layer {layer} {option} was scored before, in {seen[layer, option]}")
        seen[layer, option] = place
        score = _number(place, row, column)
        layers[layer][option] = -score if maximise else score
    empty = [layer for layer, scores in enumerate(layers) if not scores]
    if empty or not layers:
        missing = _some(empty) if empty else "0 and on"
        raise CoverageError(f"{path} has no scores of layers {missing}: every layer needs its options")
    parent = parent or _widest(blocks)
    without = [layer for layer, scores in enumerate(layers) if Option(parent) not in scores]
    if without and not distance:
        or_distance = "" if maximise else ", or say --distance where it is a distance to the parent, which scores 0"
        raise CoverageError(
            f"{path} has no {column} of the parent's own block {parent} in layers {_some(without)}: add these rows"
            f"{or_distance} (--parent names another block as the parent's)"
        )
    for scores in layers:
        scores.setdefault(Option(parent), 0.0)
    return ScoreTable(Architecture(layers=(parent,) * len(layers)), tuple(layers), column)


def read_costs(path: Path) -> CostTable:
    """A cost table: columns that name the part of a row, and any numeric columns.

    The part is `attention` and `ffn` (a block), one of them (a subblock), or `subblock` and `variant`. The subblock
    `outside` means everything outside the blocks. `layer`, `batch_size` and `scenario` restrict the row.

    Raises:
        SpecError, NonFiniteError: the file is not valid; names the row and the column.
    """
    table = _read(path)
    values = [name for name in table.columns if name not in COST_KEYS]
    if not values:
        raise SpecError(f"{path} has no cost column beside {', '.join(table.columns)}: add `decode_ms` or the like")
    rows = []
    for place, row in table.rows:
        rows.append(
            CostRow(
                part=_part(place, row),
                values={name: _number(place, row, name) for name in values if not _absent(row.get(name))},
                layer=None if _absent(row.get("layer")) else _integer(place, row, "layer"),
                batch_size=None if _absent(row.get("batch_size")) else _integer(place, row, "batch_size"),
                scenario=None if _absent(row.get("scenario")) else _name(row["scenario"]),
                origin=place,
            )
        )
    return CostTable(tuple(rows))


def _read(path: Path) -> _Table:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise SpecError(f"{path}: tables are {', '.join(READERS)} files, and this is none of them")
    try:
        table = reader(path)
    except FileNotFoundError as error:
        raise SpecError(f"the table {path} does not exist") from error
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        raise SpecError(f"cannot read the table {path}: {reason(error)}") from error
    repeated = sorted({name for name in table.columns if table.columns.count(name) > 1})
    if repeated:
        raise SpecError(f"{path} has more than one column {', '.join(map(repr, repeated))}: name each column once")
    for name in table.columns:
        if not name.isprintable():
            raise SpecError(f"{path} has a column {name!r}: take the characters out of its name that cannot be printed")
    return table


def _read_csv(path: Path) -> _Table:
    """Trailing cells that a line lacks are empty. Empty lines are skipped."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns = [name.strip() for name in next(reader, [])]
        if not any(columns):
            raise ValueError("its first line has no names of columns")
        rows = []
        for cells in reader:
            if any(cell.strip() for cell in cells[len(columns) :]):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, and the header {len(columns)}")
            if cells:
                cells += [""] * (len(columns) - len(cells))
                rows.append((f"{path.name} line {reader.line_num}", dict(zip(columns, cells, strict=False))))
    return _Table([name for name in columns if name], rows)


def _read_json(path: Path) -> _Table:
    records = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("it is no list of objects, one per row")
    return _of_records(path, list(dict.fromkeys(name for record in records for name in record)), records)


def _read_parquet(path: Path) -> _Table:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        return _of_records(path, list(table.schema.names), table.to_pylist())
    except (pyarrow.ArrowException, NotImplementedError) as error:
        raise ValueError(reason(error)) from error


READERS: dict[str, Callable[[Path], _Table]] = {".csv": _read_csv, ".parquet": _read_parquet, ".json": _read_json}


def _of_records(path: Path, columns: list[str], records: Iterable[dict[str, Any]]) -> _Table:
    rows = [
        (f"{path.name} row {number}", {str(name).strip(): value for name, value in record.items()})
        for number, record in enumerate(records)
    ]
    names = [str(name).strip() for name in columns]
    return _Table([name for name in names if name and not name.startswith("__index_level_")], rows)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values.

    Raises:
        ValueError: a key is there twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"an object has {name!r} twice")
    return dict(pairs)


def _need(path: Path, table: _Table, columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in table.columns:
            raise SpecError(f"{path} has no column {column!r} (columns: {', '.join(table.columns)})")


def _score_column(path: Path, table: _Table, column: str | None) -> str:
    if column is not None:
        if column in SCORE_KEYS:
            raise SpecError(f"{path}: {column!r} is a key of its rows and no score: name another column with --score")
        _need(path, table, (column,))
        return column
    others = [name for name in table.columns if name not in SCORE_KEYS]
    if "score" in others:
        return "score"
    if len(others) != 1:
        raise SpecError(f"{path}: which column is the score? Say --score with one of: {', '.join(others) or 'none'}")
    return others[0]


def _widest(blocks: list[BlockVariant]) -> BlockVariant:
    """The widest attention with the widest FFN: the default for the parent's own block."""
    return BlockVariant(
        attention=min((block.attention for block in blocks), key=lambda variant: variant.rank),
        ffn=min((block.ffn for block in blocks), key=lambda variant: variant.rank),
    )


def _block(place: str, row: dict[str, Any]) -> BlockVariant:
    attention, ffn = (
        _variant(place, subblock, row.get(column)) for subblock, column in (("attn", "attention"), ("ffn", "ffn"))
    )
    return BlockVariant(attention=attention, ffn=ffn)


def _part(place: str, row: dict[str, Any]) -> str:
    attention, ffn, subblock = (row.get(name) for name in ("attention", "ffn", "subblock"))
    if not _absent(subblock):
        name = _name(subblock)
        if name == OUTSIDE:
            return OUTSIDE
        if _absent(row.get("variant")) or name not in ("attn", "attention", "ffn"):
            raise SpecError(f"{place}: give subblock attn or ffn with its variant, or subblock {OUTSIDE}")
        return str(_variant(place, "ffn" if name == "ffn" else "attn", row["variant"]))
    if _absent(attention) and _absent(ffn):
        raise SpecError(f"{place} is about nothing: give attention, ffn or both, or subblock and variant")
    variants = ((subblock, text) for subblock, text in (("attn", attention), ("ffn", ffn)) if not _absent(text))
    return "+".join(str(_variant(place, subblock, text)) for subblock, text in variants)


def _variant(place: str, subblock: str, text: Any) -> Variant:
    """A variant by its id, with or without `attn:` or `ffn:` before it."""
    if _absent(text):
        raise SpecError(f"{place} has no {'attention' if subblock == 'attn' else subblock}: give its variant")
    written = _name(text)
    try:
        variant = Variant.parse(written if written.startswith(("attn:", "ffn:")) else f"{subblock}:{written}")
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from error
    if variant.subblock != subblock:
        raise SpecError(f"{place}: {written!r} is in the column of {subblock} variants")
    return variant


def _name(value: Any) -> str:
    """A name as text. A whole number that a file without text columns holds as a float is written as a whole number."""
    if isinstance(value, bytes):
        return value.decode(errors="replace").strip()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _absent(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(place: str, row: dict[str, Any], column: str) -> float:
    cell = row.get(column)
    if _absent(cell):
        raise NonFiniteError(f"{place}, column {column} is empty: fill it in, or leave the row out")
    try:
        if isinstance(cell, bool):
            raise ValueError
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise SpecError(f"{place}, column {column}: {_shown(cell)} is no number") from error
    if not math.isfinite(value):
        raise NonFiniteError(f"{place}, column {column} is {value}: fill it in, or leave the row out")
    if value and not LEAST <= abs(value) <= LARGEST:
        raise SpecError(
            f"{place}, column {column} is {value:g}: numbers lie between {LEAST:g} and {LARGEST:g} or are 0; use "
            "another unit"
        )
    return value


def _shown(cell: Any) -> str:
    """A cell for a message, cut where it is long."""
    text = repr(cell)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _some(layers: list[int]) -> str:
    """The first of many layers."""
    return str(layers) if len(layers) <= 10 else f"{str(layers[:10])[:-1]}, ...] ({len(layers)} in all)"


def _integer(place: str, row: dict[str, Any], column: str, default: int | None = None) -> int:
    if _absent(row.get(column)):
        if default is None:
            raise SpecError(f"{place}, column {column} is empty")
        return default
    value = _number(place, row, column)
    if value != int(value) or value < (0 if column == "layer" else 1):
        raise SpecError(f"{place}, column {column}: {value:g} is no {column.replace('_', ' ')}")
    return int(value)
