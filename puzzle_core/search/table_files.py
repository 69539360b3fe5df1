"""Reads scores and costs from files: CSV, Parquet or JSON (docs/formats.md). No torch, no Prefect."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from puzzle_core.architecture import BlockVariant, Variant
from puzzle_core.errors import CoverageError, NonFiniteError, SpecError
from puzzle_core.search.tables import OUTSIDE, CostRow, CostTable, Option, ScoreTable

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": partial(pd.read_csv, dtype=str, keep_default_na=False),
    ".parquet": pd.read_parquet,
    ".json": partial(pd.read_json, dtype=False, convert_dates=False),
}
"""Cells are taken as written: pandas would make numbers, dates or missing values of names that look like them."""
MOST_LAYERS = 10_000
SCORE_KEYS = ("layer", "attention", "ffn", "span")
COST_KEYS = ("scenario", "batch_size", "layer", "attention", "ffn", "subblock", "variant")


def read_scores(
    path: Path, column: str | None = None, maximise: bool = False, parent: BlockVariant | None = None
) -> ScoreTable:
    """A score table: columns `layer`, `attention`, `ffn`, the score, and optionally `span`.

    Args:
        column: the score's name; required if the file has several numeric columns and none is named `score`.
        maximise: larger scores are better. The table negates them.
        parent: the parent's own block; by default the widest attention with the widest FFN. Its score is 0 in layers
            without a row for it.

    Raises:
        SpecError, CoverageError, NonFiniteError: the file is not valid; names the row and the column.
    """
    frame = _read(path)
    _need(path, frame, ("layer", "attention", "ffn"))
    column = _score_column(path, frame, column)
    rows = list(_rows(path, frame))
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
        raise CoverageError(f"{path} has no scores of layers {empty or '0 and on'}: every layer needs its options")
    parent = parent or _widest(blocks)
    without = [layer for layer, scores in enumerate(layers) if Option(parent) not in scores]
    if maximise and without:
        raise CoverageError(
            f"{path} has no score of the parent's own block {parent} in layers {without}: a score to maximise is no "
            "distance to the parent, so the parent needs its own; add these rows"
        )
    for scores in layers:
        scores.setdefault(Option(parent), 0.0)
    return ScoreTable(parent, tuple(layers), column)


def read_costs(path: Path) -> CostTable:
    """A cost table: columns that name the part of a row, and any numeric columns.

    The part is `attention` and `ffn` (a block), one of them (a subblock), or `subblock` and `variant`. The subblock
    `outside` means everything outside the blocks. `layer`, `batch_size` and `scenario` restrict the row.

    Raises:
        SpecError, NonFiniteError: the file is not valid; names the row and the column.
    """
    frame = _read(path)
    values = [name for name in frame.columns if name not in COST_KEYS]
    if not values:
        raise SpecError(f"{path} has no cost column beside {', '.join(frame.columns)}: add `decode_ms` or the like")
    rows = []
    for place, row in _rows(path, frame):
        rows.append(
            CostRow(
                part=_part(place, row),
                values={name: _number(place, row, name) for name in values if not _absent(row[name])},
                layer=None if _absent(row.get("layer")) else _integer(place, row, "layer"),
                batch_size=None if _absent(row.get("batch_size")) else _integer(place, row, "batch_size"),
                scenario=None if _absent(row.get("scenario")) else _name(row["scenario"]),
                origin=place,
            )
        )
    return CostTable(tuple(rows))


def _read(path: Path) -> pd.DataFrame:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise SpecError(f"{path}: tables are {', '.join(READERS)} files, and this is none of them")
    try:
        frame = reader(path)
    except FileNotFoundError as error:
        raise SpecError(f"the table {path} does not exist") from error
    except (ValueError, OSError) as error:
        raise SpecError(f"cannot read the table {path}: {error}") from error
    return frame


def _rows(path: Path, frame: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row as values, with its place for messages. The header of a CSV file is line 1."""
    first, what = (2, "line") if path.suffix == ".csv" else (0, "row")
    for number, row in enumerate(frame.to_dict("records")):
        yield f"{path.name} {what} {number + first}", {str(name): value for name, value in row.items()}


def _need(path: Path, frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in frame.columns:
            raise SpecError(f"{path} has no column {column!r} (columns: {', '.join(map(str, frame.columns))})")


def _score_column(path: Path, frame: pd.DataFrame, column: str | None) -> str:
    if column is not None:
        _need(path, frame, (column,))
        return column
    others = [str(name) for name in frame.columns if name not in SCORE_KEYS]
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
    return BlockVariant(attention=_variant(place, "attn", row["attention"]), ffn=_variant(place, "ffn", row["ffn"]))


def _part(place: str, row: dict[str, Any]) -> str:
    attention, ffn, subblock = (row.get(name) for name in ("attention", "ffn", "subblock"))
    if not _absent(subblock):
        if str(subblock) == OUTSIDE:
            return OUTSIDE
        if _absent(row.get("variant")) or str(subblock) not in ("attn", "attention", "ffn"):
            raise SpecError(f"{place}: say subblock attn or ffn with its variant, or subblock {OUTSIDE}")
        return str(_variant(place, "ffn" if subblock == "ffn" else "attn", row["variant"]))
    if _absent(attention) and _absent(ffn):
        raise SpecError(f"{place} is about nothing: give attention, ffn or both, or subblock and variant")
    variants = ((subblock, text) for subblock, text in (("attn", attention), ("ffn", ffn)) if not _absent(text))
    return "+".join(str(_variant(place, subblock, text)) for subblock, text in variants)


def _variant(place: str, subblock: str, text: Any) -> Variant:
    """A variant by its id, with or without `attn:` or `ffn:` before it."""
    written = str(text)
    try:
        variant = Variant.parse(written if ":" in written else f"{subblock}:{written}")
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from error
    if variant.subblock != subblock:
        raise SpecError(f"{place}: {written!r} is in the column of {subblock} variants")
    return variant


def _name(value: Any) -> str:
    """A name as text. A whole number that a file without text columns holds as a float is written as a whole number."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(place: str, row: dict[str, Any], column: str) -> float:
    if _absent(row[column]):
        raise NonFiniteError(f"{place}, column {column} is empty: fill it in, or leave the row out")
    try:
        value = float(row[column])
    except (TypeError, ValueError) as error:
        raise SpecError(f"{place}, column {column}: {row[column]!r} is no number") from error
    if not math.isfinite(value):
        raise NonFiniteError(f"{place}, column {column} is {value}: fill it in, or leave the row out")
    return value


def _integer(place: str, row: dict[str, Any], column: str, default: int | None = None) -> int:
    if _absent(row.get(column)):
        if default is None:
            raise SpecError(f"{place}, column {column} is empty")
        return default
    value = _number(place, row, column)
    if value != int(value) or value < (0 if column == "layer" else 1):
        raise SpecError(f"{place}, column {column}: {row[column]} is no {column.replace('_', ' ')}")
    return int(value)
