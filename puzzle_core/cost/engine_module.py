"""The module of an engine: functions of fixed names, found through the engine's row in puzzle_core/engines.py.

| function | named by | |
|---|---|---|
| `engine_version` | both | the engine's name and version; it raises where the engine is not installed |
| `measure_costs` | `costs_module` | times of every variant for one traffic |
| `time_architectures` | `costs_module` | times of whole models, end to end |
| `bench_models` | `bench_module` | times of parent and child at several batch sizes and contexts |

Models are of random weights, since times depend on shapes alone.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from puzzle_core.cost.measuring import Rounds
from puzzle_core.engines import ENGINES
from puzzle_core.export.source import Source
from puzzle_core.model.parent import Parent
from puzzle_core.progress import Report, no_report
from puzzle_core.target import TargetSpec
from puzzle_core.work import CostRecord, CostWork, TimingRecord, TimingWork, Traffic


class BenchRequest(NamedTuple):
    """What a bench measures: models by name, each with random weights, at every traffic.

    `python` is the interpreter of an environment that has the engine, where this one has not.
    """

    sources: Mapping[str, Source]
    target: TargetSpec
    traffics: Sequence[Traffic]
    python: Path | None


class BenchTimes(NamedTuple):
    """The outcome of a bench: `rounds` has, per traffic, the times of every model.

    `engine` is the name and version of the engine; `weight_bytes` is the size of all weights by model, `entry_bytes`
    the size of one entry of the KV cache.
    """

    engine: str
    weight_bytes: Mapping[str, float]
    entry_bytes: float
    rounds: Sequence[Mapping[str, Rounds]]


class CostModule(Protocol):
    """A module that measures costs in an engine."""

    def engine_version(self) -> str:
        """The engine's name and version.

        Raises:
            SpecError: the engine is not installed; says how to install it.
        """

    def measure_costs(self, work: CostWork, parent: Parent, report: Report = no_report) -> CostRecord:
        """Measure all variants, what lies outside the blocks, and the parent.

        Raises:
            SpecError: the engine is not installed.
            ExportError: the parent cannot be written in the engine's format.
            MeasurementError: the engine fails, or the time of a variant is not positive.
        """

    def time_architectures(self, work: TimingWork, parent: Parent, report: Report = no_report) -> TimingRecord:
        """Time whole models end to end, in turns.

        Raises:
            SpecError, ExportError, MeasurementError: as `measure_costs`.
        """


class BenchModule(Protocol):
    """A module that runs a bench in an engine."""

    def bench_models(self, request: BenchRequest, report: Callable[[str], None]) -> BenchTimes:
        """Time the models of a request in turns, at every traffic; `report` is called with a line of progress.

        Raises:
            SpecError: the engine is not installed, or the interpreter is missing.
            ExportError: a model cannot be written in the engine's format.
            MeasurementError: the engine fails.
        """


def cost_module(engine: str) -> CostModule:
    """The module that measures costs in an engine; a target's validation refuses engines that have none."""
    name = ENGINES[engine].costs_module
    assert name, f"{engine} measures no costs"
    return cast(CostModule, importlib.import_module(name))


def bench_module(engine: str) -> BenchModule:
    """The module that runs a bench in an engine."""
    name = ENGINES[engine].bench_module
    assert name, f"{engine} runs no bench"
    return cast(BenchModule, importlib.import_module(name))


def traffic_label(traffic: Traffic) -> str:
    """A traffic in a line of progress."""
    return f"batch {traffic.batch_size}, {traffic.prompt_tokens} prompt tokens"
