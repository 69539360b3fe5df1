"""What a run took, stage by stage: hours of cores and of GPUs, and bytes."""

from collections.abc import Iterable

from puzzle_core.report.report_inputs import StageEffort
from puzzle_core.report.report_tables import Table
from puzzle_core.report.units import NONE, bytes_text, number_text

HOUR_S = 3600.0


def total(efforts: Iterable[StageEffort]) -> StageEffort:
    """All stages as one."""
    stages = list(efforts)
    return StageEffort(
        stage="all",
        artifacts=sum(effort.artifacts for effort in stages),
        size_bytes=sum(effort.size_bytes for effort in stages),
        core_seconds=sum(effort.core_seconds for effort in stages),
        gpu_seconds=sum(effort.gpu_seconds for effort in stages),
        unknown=sum(effort.unknown for effort in stages),
    )


def effort_table(efforts: tuple[StageEffort, ...], price_per_hour: float | None = None) -> Table:
    """The stages and their sum; with a price of a device's hour also what each comes to.

    The price is that of GPU hours where GPUs computed, and of core hours elsewhere.
    """
    whole = total(efforts)
    rows = tuple(_row(effort, whole.gpu_seconds > 0, price_per_hour) for effort in (*efforts, whole)) if efforts else ()
    priced = ("price",) if price_per_hour else ()
    unknown = f" {whole.unknown} artifacts of an older version do not say." if whole.unknown else ""
    return Table(
        title="What it took",
        columns=("stage", "artifacts", "bytes", "core-hours", "GPU-hours", *priced),
        rows=rows,
        note=f"Hours in which cores or GPUs computed these artifacts, by whichever run made them.{unknown}",
    )


def _row(effort: StageEffort, on_gpus: bool, price_per_hour: float | None) -> tuple[str, ...]:
    seconds = (effort.core_seconds, effort.gpu_seconds)
    hours = [number_text(each / HOUR_S) if each else NONE for each in seconds]
    price = (number_text(seconds[on_gpus] / HOUR_S * price_per_hour),) if price_per_hour else ()
    return effort.stage, f"{effort.artifacts:,}", bytes_text(effort.size_bytes), *hours, *price
