"""What a run took, stage by stage: hours of cores and of GPUs, and bytes."""

from collections.abc import Iterable

from puzzle_core.report.report_inputs import StageUsage
from puzzle_core.report.report_tables import Table
from puzzle_core.report.units import NONE, bytes_text, number_text

HOUR_S = 3600.0


def total(usages: Iterable[StageUsage]) -> StageUsage:
    """All stages as one."""
    stages = list(usages)
    return StageUsage(
        stage="all",
        artifacts=sum(usage.artifacts for usage in stages),
        size_bytes=sum(usage.size_bytes for usage in stages),
        core_seconds=sum(usage.core_seconds for usage in stages),
        gpu_seconds=sum(usage.gpu_seconds for usage in stages),
        unknown=sum(usage.unknown for usage in stages),
    )


def usage_table(usages: tuple[StageUsage, ...], price_per_hour: float | None = None) -> Table:
    """The stages and their sum; with a price of a device's hour also what each comes to.

    The price is that of GPU hours where GPUs computed, and of core hours elsewhere.
    """
    whole = total(usages)
    rows = tuple(_row(usage, whole.gpu_seconds > 0, price_per_hour) for usage in (*usages, whole)) if usages else ()
    priced = ("price",) if price_per_hour else ()
    unknown = f" {whole.unknown} artifacts of an older version do not say." if whole.unknown else ""
    return Table(
        title="What it took",
        columns=("stage", "artifacts", "bytes", "core-hours", "GPU-hours", *priced),
        rows=rows,
        note=f"Hours in which cores or GPUs computed these artifacts, by whichever run made them.{unknown}",
    )


def _row(usage: StageUsage, on_gpus: bool, price_per_hour: float | None) -> tuple[str, ...]:
    seconds = (usage.core_seconds, usage.gpu_seconds)
    hours = [number_text(each / HOUR_S) if each else NONE for each in seconds]
    price = (number_text(seconds[on_gpus] / HOUR_S * price_per_hour),) if price_per_hour else ()
    return usage.stage, f"{usage.artifacts:,}", bytes_text(usage.size_bytes), *hours, *price
