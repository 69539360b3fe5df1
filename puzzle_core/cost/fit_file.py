"""Rows of a measurement file that a target stands for, and the fit to them in the target's file. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puzzle_core.cost.calibrate import fit_serving
from puzzle_core.cost.measurements import Measurement, shape_of
from puzzle_core.errors import SpecError
from puzzle_core.precisions import Precision
from puzzle_core.records import write_text_atomic
from puzzle_core.target import Efficiency, Fit, TargetSpec
from puzzle_core.yaml_file import read_keys, yaml_text

ALIASES: dict[str, Precision] = {"fp16": "float16", "f16": "float16", "bf16": "bfloat16", "fp32": "float32"}
SIXTEEN_BITS = ("bfloat16", "float16")


def fit_rows(
    target: TargetSpec,
    rows: Sequence[Measurement],
    *,
    device: str | None = None,
    table: str | None = None,
    version: str | None = None,
) -> Fit:
    """Fit the target's factors to the rows of its engine and precision.

    Args:
        device, table, version: of the rows that count; unset: all of the file, which must agree in device and version.

    Raises:
        SpecError: the target has no figures, or the rows are of several devices or versions, or none is left.
        MeasurementError: there are too few rows.
    """
    if target.hardware is None:
        raise SpecError(f"target {target.name} has no figures to fit: give it `costs: roofline` and `hardware`")
    wanted: dict[str, str | None] = {"device": device, "table": table, "version": version}
    chosen = [row for row in rows if all(value in (None, getattr(row, name)) for name, value in wanted.items())]
    chosen = [row for row in chosen if row.engine in ("", target.engine)]
    found = sorted({row.precision for row in chosen})
    chosen = [row for row in chosen if _same_precision(row.precision, target.hardware.weights)]
    if not chosen:
        of = ", ".join(f"{name} {value}" for name, value in wanted.items() if value)
        raise SpecError(
            f"no row is of engine {target.engine} and weights {target.hardware.weights}{', ' if of else ''}{of} "
            f"(precisions there: {', '.join(found) or 'none'}): set the target's `engine`, or choose other rows"
        )
    for name in ("device", "version"):
        values = sorted({getattr(row, name) for row in chosen})
        if len(values) > 1:
            raise SpecError(f"the rows are of {name} {', '.join(values)}: choose one with --{name}")
    sources = "; ".join(dict.fromkeys(row.source for row in chosen if row.source))
    tables = ", ".join(dict.fromkeys(row.table for row in chosen if row.table))
    what = f"{sources or 'measured rows'}{f' (table {tables})' if tables else ''}; fitted to every other row"
    return fit_serving(target, {row.model: shape_of(row.model) for row in chosen}, chosen, what)


def _same_precision(measured: str, weights: Precision) -> bool:
    name = ALIASES.get(measured, measured)
    return name == weights or (name in SIXTEEN_BITS and weights in SIXTEEN_BITS)


def write_fit(path: Path, fit: Fit) -> None:
    """Put the fit into a target's file in place of one of the same engine and version; its comment lines stay on top.

    Raises:
        SpecError: the file cannot be read.
    """
    content = read_keys(path, "target", "a target starts with `name:`")
    others = [
        other
        for other in content["hardware"].get("fits", [])
        if (other["engine"], str(other["version"])) != (fit.engine, fit.version)
    ]
    content["hardware"]["fits"] = [*others, fit_content(fit)]
    _write(path, content)


def write_efficiency(path: Path, efficiency: Efficiency) -> None:
    """Put factors into a target's file in place of assumed ones; its comment lines stay on top.

    Raises:
        SpecError: the file cannot be read.
    """
    content = read_keys(path, "target", "a target starts with `name:`")
    content["hardware"]["efficiency"] = factors_content(efficiency)
    _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    comments = [line for line in path.read_text(encoding="utf-8-sig").splitlines(keepends=True) if line.startswith("#")]
    write_text_atomic(path, "".join(comments) + yaml_text(content))


def factors_content(efficiency: Efficiency) -> dict[str, float]:
    """Factors as plain values, to three digits."""
    return {name: float(f"{value:.3g}") for name, value in efficiency.model_dump(mode="json").items()}


def fit_content(fit: Fit) -> dict[str, object]:
    """The fit as plain values, factors to three digits."""
    return fit.model_dump(mode="json") | {"efficiency": factors_content(fit.efficiency)}
