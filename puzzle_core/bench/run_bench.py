"""Parent against child in one engine: prefill and decode over batch sizes and contexts, in turns (`puzzle bench`).

Weights are random, in the shapes of the child and of its parent, which the child's config describes: speed depends on
nothing else. The engine's module measures (cost/engine_module.py).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.bench.bench_record import CHILD, PARENT, BenchPoint, BenchRecord
from puzzle_core.cost.engine_module import BenchRequest, BenchTimes, bench_module
from puzzle_core.cost.measuring import hardware_name, timing_of
from puzzle_core.engines import ENGINES, engines_with
from puzzle_core.errors import SpecError
from puzzle_core.export.source import RandomSource, Source
from puzzle_core.sizes import kv_entries
from puzzle_core.target import TargetSpec
from puzzle_core.work import Traffic


class Sweep(NamedTuple):
    """The points of a bench: every batch size at every context, each with this many generated tokens."""

    batch_sizes: Sequence[int]
    contexts: Sequence[int]
    generated_tokens: int


def bench_target(engine: str, gguf_type: str | None, settings: Mapping[str, Any]) -> TargetSpec:
    """The target of a bench. It names the engine where the engine's costs can be measured.

    Args:
        settings: other fields of the target: types, threads, rounds.

    Raises:
        SpecError: a type of weights that the engine does not read.
    """
    row = ENGINES[engine]
    if gguf_type and gguf_type not in row.gguf_types:
        takers = engines_with(lambda other: other.gguf_types and other.bench_module)
        raise SpecError(f"--gguf-type is of --engine {' or '.join(takers)}, and the engine is {engine}: leave it out")
    named = {"engine": engine} if row.costs_module else {}
    return TargetSpec.model_validate({**settings, **named, "gguf_type": gguf_type})


def run_bench(
    directory: Path,
    engine: str,
    target: TargetSpec,
    sweep: Sweep,
    python: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> BenchRecord:
    """Compare the child in a directory with its parent, in an engine.

    Args:
        target: device, types, threads and rounds.
        python: the interpreter of an environment that has the engine, for engines that are not in this one.

    Raises:
        SpecError: a context that the model does not have, or an engine that is not installed.
        ExportError: the child cannot be written in the engine's format.
        MeasurementError: the engine failed.
    """
    child = Source(directory)
    longest = max(sweep.contexts) + sweep.generated_tokens
    if longest > child.shape.max_positions:
        raise SpecError(
            f"{max(sweep.contexts)} prompt and {sweep.generated_tokens} generated tokens are asked for, and "
            f"the context of the model holds {child.shape.max_positions}"
        )
    if sweep.generated_tokens < 2:
        raise SpecError(f"{sweep.generated_tokens} generated tokens leave nothing to decode: ask for 2 or more")
    sources = {PARENT: RandomSource(directory), CHILD: RandomSource(directory, child.architecture)}
    traffics = [
        Traffic(prompt_tokens=context, generated_tokens=sweep.generated_tokens, batch_size=batch)
        for batch, context in itertools.product(sweep.batch_sizes, sweep.contexts)
    ]
    times = bench_module(engine).bench_models(BenchRequest(sources, target, traffics, python), report)
    return BenchRecord(
        engine=times.engine,
        hardware=hardware_name(target),
        target=target,
        architecture=child.architecture,
        points=tuple(_points(sources, traffics, times)),
    )


def _points(sources: Mapping[str, Source], traffics: Sequence[Traffic], times: BenchTimes) -> list[BenchPoint]:
    """One point per traffic and model; memory is the weights, and the KV cache of the batch at its full context."""
    points = []
    for traffic, rounds in zip(traffics, times.rounds, strict=True):
        tokens = traffic.prompt_tokens + traffic.generated_tokens
        for name, source in sources.items():
            entries = traffic.batch_size * kv_entries(source.shape, source.architecture, tokens)
            points.append(
                BenchPoint(
                    **traffic.model_dump(),
                    model=name,
                    timing=timing_of(rounds[name]),
                    memory_bytes=times.weight_bytes[name] + times.entry_bytes * entries,
                )
            )
    return points
