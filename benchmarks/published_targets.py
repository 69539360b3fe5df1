"""Published serving speeds, and what the shipped targets predict for them (docs/targets.md).

`benchmarks/measurements/serving.csv` has the tables with their sources, figures only; `--measurements` takes any file
of its form. Each row is predicted with the shipped target of its device and precision. Rows that the target's factors
were fitted to are counted apart from those that were held out and from those of other engines, versions and models.

`--config` also compares a published 70B parent with its 51B child (METHOD section 8). The architecture of the 51B is
not available, so the 49B of the same family replaces it: 49.87B parameters and 98 KiB of fp8 KV cache per token,
against 51.5B and 93 KiB. Nothing is fitted to these six scenarios.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.cost.measurements import Measurement, read_measurements, shape_of
from puzzle_core.cost.serving import Served, on_devices, predict, serve
from puzzle_core.errors import SpecError
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.target import Reservation, TargetSpec, load_target

TARGETS = Path(__file__).parents[1] / "deployments/targets"
TARGET = TARGETS / "h100-80gb-fp8.yaml"
MEASUREMENTS = Path(__file__).parent / "measurements/serving.csv"
FILES = {
    ("h200", "fp8"): "h200",
    ("h100", "fp8"): "h100-80gb-fp8",
    ("a100", "fp16"): "a100-80gb",
    ("l40s", "fp8"): "l40s",
    ("rtx-4090", "f16"): "rtx-4090-bf16",
    ("rtx-4090", "q4_k_m"): "rtx-4090-q4-k-m",
    ("m3-max", "f16"): "m3-max-f16",
    ("m3-max", "q4_k_m"): "m3-max-q4-k-m",
}
"""Shipped targets by the device and precision of a row."""
FITTED_TABLE = "T1"
"""Whose rows the shipped factors were fitted to, every other one of a device."""
PARENT_DEVICES, CHILD_DEVICES = 4, 1
WITHIN = 0.25
RESERVATIONS: tuple[Reservation, ...] = ("guaranteed", "optimistic")


class Published(NamedTuple):
    """One published scenario: generated tokens per second and GPU of the parent on four and the child on one."""

    prompt_tokens: int
    generated_tokens: int
    parent: float
    child: float

    @property
    def ratio(self) -> float:
        """How many times as much the child generates per GPU."""
        return self.child / self.parent


PUBLISHED = (
    Published(128, 128, 2645, 5478),
    Published(128, 1024, 2975, 6472),
    Published(128, 2048, 2786, 4910),
    Published(128, 4096, 1828, 3855),
    Published(2048, 128, 339, 653),
    Published(2048, 2048, 1336, 2622),
)


class Row(NamedTuple):
    """A measured row beside our figure for it; `fitted` where factors were fitted to it."""

    measured: Measurement
    ours: float
    fitted: bool

    @property
    def ratio(self) -> float:
        """Ours over measured."""
        return self.ours / self.measured.value


def read_published(config: Path) -> tuple[ModelShape, Architecture]:
    """The parent's shape and the child's architecture from the child's `config.json` (METHOD section 9)."""
    content: dict[str, Any] = json.loads(config.read_text())
    heads, hidden = content["num_attention_heads"], content["hidden_size"]
    layers = tuple(_block(heads, hidden, block) for block in content["block_configs"])
    shape = ModelShape(
        family="llama",
        layers=content["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=hidden // heads,
        ffn_width=28672,
        vocabulary=content["vocab_size"],
        tied_embeddings=content["tie_word_embeddings"],
        qkv_bias=content["attention_bias"],
        attention_out_bias=content["attention_bias"],
        mlp_bias=content["mlp_bias"],
        qk_norm=False,
        max_positions=content["max_position_embeddings"],
    )
    return shape, Architecture(layers=layers)


def _block(heads: int, hidden: int, block: dict[str, dict[str, Any]]) -> BlockVariant:
    attention, width = block["attention"], int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
    return BlockVariant(
        attention=Variant("attn", "no_op")
        if attention["no_op"]
        else Variant("attn", "sized", heads // attention["n_heads_in_group"]),
        ffn=Variant("ffn", "sized", -(-width // 256) * 256),
    )


def compare(shape: ModelShape, child: Architecture, target: TargetSpec) -> list[tuple[Published, Served, Served]]:
    """Every scenario as published, and what the target serves of parent and child."""
    parent, ours = Architecture.of_parent(shape), []
    for row in PUBLISHED:
        tokens = row.prompt_tokens, row.generated_tokens
        of_parent = serve(shape, parent, on_devices(target, PARENT_DEVICES), *tokens)
        of_child = serve(shape, child, on_devices(target, CHILD_DEVICES), *tokens)
        ours.append((row, of_parent, of_child))
    return ours


def reserved_as(target: TargetSpec, reservation: Reservation) -> TargetSpec:
    """The target with cache reserved for the whole context of a sequence, or for its mean."""
    assert target.hardware, "the roofline needs figures"
    serving = target.hardware.serving.model_copy(update={"reservation": reservation})
    return target.model_copy(update={"hardware": target.hardware.model_copy(update={"serving": serving})})


def ratio(parent: Served, child: Served) -> float:
    """How many times as much the child generates per device."""
    return per_device(child, CHILD_DEVICES) / per_device(parent, PARENT_DEVICES)


def per_device(served: Served, devices: int) -> float:
    """Generated tokens per second and device."""
    return served.tokens_per_s / devices


def comparison_table(compared: list[tuple[Published, Served, Served]], reservation: Reservation) -> Table:
    """Published against roofline, one row per scenario."""
    rows = []
    for row, parent, child in compared:
        ours = ratio(parent, child)
        rows.append(
            (
                f"{row.prompt_tokens}/{row.generated_tokens}",
                *(f"{number:,.0f}" for number in (row.parent, per_device(parent, PARENT_DEVICES), parent.batch_size)),
                *(f"{number:,.0f}" for number in (row.child, per_device(child, CHILD_DEVICES), child.batch_size)),
                f"{row.ratio:.2f}",
                f"{ours:.2f}",
                f"{ours / row.ratio - 1:+.0%}",
            )
        )
    columns = ("roofline", "batch")
    return Table(
        title=f"Generated tokens per second and H100: 70B parent on four, child on one, fp8, {reservation} cache",
        columns=(
            "scenario",
            "parent published",
            *columns,
            "child published",
            *columns,
            "ratio published",
            "roofline",
            "error",
        ),
        rows=tuple(rows),
    )


def predict_rows(rows: Sequence[Measurement], directory: Path = TARGETS) -> tuple[list[Row], list[str]]:
    """Our figure for every row that a shipped target stands for, and why others have none."""
    targets: dict[str, TargetSpec] = {}
    found, left_out, places = [], [], dict.fromkeys({row.device for row in rows}, 0)
    for row in rows:
        name = FILES.get((row.device, row.precision))
        place = places[row.device] if row.table == FITTED_TABLE else 1
        places[row.device] += row.table == FITTED_TABLE
        where = f"{row.table} {row.model} {row.device} {row.precision} {row.input_tokens}/{row.output_tokens}"
        if name is None:
            left_out.append(f"{where}: no target of this device and precision")
            continue
        if name not in targets:
            targets[name] = load_target(directory / f"{name}.yaml")
        try:
            ours = predict(row, shape_of(row.model), targets[name])
        except SpecError as error:
            left_out.append(f"{where}: {error}")
            continue
        found.append(Row(row, ours, fitted=place % 2 == 0))
    return found, left_out


def rows_table(rows: Sequence[Row]) -> Table:
    """Every row beside our figure."""
    return Table(
        title="Measured and predicted",
        columns=("table", "model", "device", "devices", "tokens", "at a time", "quantity", "measured", "ours", "ratio"),
        rows=tuple(
            (
                row.measured.table,
                row.measured.model,
                row.measured.device,
                str(row.measured.tensor_parallel),
                f"{row.measured.input_tokens}/{row.measured.output_tokens}",
                str(row.measured.concurrency or "max"),
                row.measured.quantity,
                f"{row.measured.value:,.1f}",
                f"{row.ours:,.1f}",
                f"{row.ratio:.2f}{' fitted' if row.fitted else ''}",
            )
            for row in rows
        ),
        text_columns=7,
    )


def summary_table(rows: Sequence[Row]) -> Table:
    """By table, quantity, device and whether rows were fitted; then all held-out rows of the fitted table."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        use = "fitted" if row.fitted else "held out" if row.measured.table == FITTED_TABLE else "not fitted"
        key = row.measured.table, row.measured.quantity, row.measured.device, use
        groups.setdefault(key, []).append(row)
    held_out = [row for row in rows if row.measured.table == FITTED_TABLE and not row.fitted]
    if held_out:
        groups[FITTED_TABLE, "output_tokens_per_s", "all", "held out"] = held_out
    return Table(
        title="Ours over measured",
        columns=("table", "quantity", "device", "rows are", "rows", "geometric mean", "mean error", "within 25 %"),
        rows=tuple((*key, *_errors(found)) for key, found in groups.items()),
        text_columns=4,
    )


def _errors(rows: Sequence[Row]) -> tuple[str, ...]:
    """Number of rows, geometric mean of ours over measured, mean of |ratio - 1|, and how many are within 25 %."""
    mean = math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))
    errors = [abs(row.ratio - 1) for row in rows]
    within = sum(error <= WITHIN for error in errors)
    return str(len(rows)), f"{mean:.2f}", f"{sum(errors) / len(rows):.1%}", f"{within} ({within / len(rows):.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="table of measured speeds (CSV)")
    parser.add_argument("--targets", type=Path, default=TARGETS, help="directory of the target files")
    parser.add_argument("--config", type=Path, help="config.json of Llama-3_3-Nemotron-Super-49B-v1")
    parser.add_argument("--summary", action="store_true", help="leave out the single rows")
    arguments = parser.parse_args()
    rows, left_out = predict_rows(read_measurements(arguments.measurements), arguments.targets)
    tables = [summary_table(rows)] if arguments.summary else [rows_table(rows), summary_table(rows)]
    if arguments.config:
        shape, child = read_published(arguments.config)
        target = load_target(arguments.targets / TARGET.name)
        tables += [comparison_table(compare(shape, child, reserved_as(target, how)), how) for how in RESERVATIONS]
    sys.stdout.write("\n\n".join(format_text(table) for table in tables) + "\n")
    if left_out:
        sys.stdout.write("\nnot predicted:\n" + "".join(f"  {text}\n" for text in left_out))


if __name__ == "__main__":
    main()
