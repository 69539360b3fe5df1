"""The record of a bench of parent and child, which run_bench.py makes and report/bench_report.py shows. No torch."""

import csv
import io

from puzzle_core.architecture import Architecture
from puzzle_core.records import Record
from puzzle_core.target import TargetSpec
from puzzle_core.work import Timing

PARENT, CHILD = "parent", "child"


class BenchPoint(Record):
    """One model at one batch size and context; `decode_ms` is for all tokens after the first."""

    model: str
    batch_size: int
    prompt_tokens: int
    generated_tokens: int
    timing: Timing
    memory_bytes: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens of the whole batch."""
        return self.batch_size * self.prompt_tokens / self.timing.prefill_ms * 1e3

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens of the whole batch."""
        return self.batch_size * self.user_tokens_per_s

    @property
    def user_tokens_per_s(self) -> float:
        """Generated tokens of one sequence."""
        return (self.generated_tokens - 1) / self.timing.decode_ms * 1e3


class BenchRecord(Record):
    """All points of a bench; those of parent and child alternate. `engine` is its name with its version.

    `target` has the device, types, threads and rounds of the measurement.
    """

    engine: str
    hardware: str
    target: TargetSpec
    architecture: Architecture
    points: tuple[BenchPoint, ...]


def as_csv(record: BenchRecord) -> str:
    """One line per point, with its rates."""
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s", "user_tokens_per_s")
    rows = [
        point.model_dump(exclude={"timing"})
        | point.timing.model_dump()
        | {rate: getattr(point, rate) for rate in rates}
        for point in record.points
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
