"""Measured prefill and decode times in llama.cpp (METHOD section 5): what a child exported as GGUF will take.

Like latency.py, this times whole models of random weights in turns and takes differences. T(a, f) is a stack of n
layers with attention a and FFN f, but for the first, which keeps the parent's attention: llama.cpp wants one there.

    attention a   (T(a, f) - T(none, f)) / (n - 1)      the mean over f: the parent's, and the narrowest
    FFN v         (T(a, v) - T(a, narrowest)) / n       the mean over a: the parent's, and none; plus a narrowest FFN
    narrowest     (T(none, narrowest) - one layer of it) / (n - 1)
    outside       that one layer, less its two subblocks

A subblock takes longer beside the other subblock than alone, by a tenth on small parents, for it finds less in the
processor's cache: hence the means, which share between the two what both cause together.

Exports are lowered to llama.cpp's own layers (model/export/lowering.py). None lacks an FFN: an attention without one
gets the narrowest, of zeros (`no_ffn`). A linear FFN takes a layer of its own, which is counted as part of it.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from puzzle_core.architecture import NO_ATTENTION, Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.cost.latency import (
    DECODE_POINTS,
    OUTSIDE,
    PARENT,
    STACK_BYTES,
    STEPS_PER_POINT,
    Rounds,
    positive_timing,
    take_turns,
    timing_of,
)
from puzzle_core.cost.llama_engine import LlamaModel, engine_version
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.lowering import ZERO_WIDTH
from puzzle_core.export.source import RandomSource, Source
from puzzle_core.model.parent import Parent
from puzzle_core.sizes import variant_size
from puzzle_core.spec import TargetSpec
from puzzle_core.target import GgufType
from puzzle_core.work import CostRecord, CostWork, TimingRecord, TimingWork, Traffic

ONE_LAYER = "one layer"
NARROWEST = Variant("ffn", "sized", ZERO_WIDTH)
BYTES: dict[GgufType, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}
CACHE_BYTES = 2.0
"""llama.cpp's default: a float16 cache."""


def gguf_type(target: TargetSpec) -> GgufType:
    """The type of the weights that is measured."""
    return target.gguf_type or ("f32" if target.dtype == "float32" else "bf16")


def run(work: CostWork, parent: Parent, report: Callable[[int, int], None] | None = None) -> CostRecord:
    """Measure all variants, what lies outside, and the parent, interleaved.

    Raises:
        SpecError: llama-cpp-python is not installed.
        ExportError: the parent cannot be written as GGUF.
        MeasurementError: llama.cpp fails, or a variant came out at no time at all.
    """
    sources = {
        name: RandomSource(parent.directory, stack) for name, stack in cost_architectures(work, parent.shape).items()
    }
    with exported(sources, work.target) as files, opened(files, work.traffic, work.target) as models:
        return cost_record(work, parent.shape, time_models(models, work.traffic, work.target, report))


def run_timing(work: TimingWork, parent: Parent, report: Callable[[int, int], None] | None = None) -> TimingRecord:
    """Time whole models end to end, interleaved; their weights are random, for times do not depend on them."""
    sources = {name: RandomSource(parent.directory, architecture) for name, architecture in work.architectures}
    with exported(sources, work.target) as files, opened(files, work.traffic, work.target) as models:
        times = time_models(models, work.traffic, work.target, report)
    return TimingRecord(models={name: timing_of(rounds) for name, rounds in times.items()}, hardware=work.hardware)


def cost_architectures(work: CostWork, shape: ModelShape) -> dict[str, Architecture]:
    """What a cost record is made from: the parent, one layer, and stacks by the block of all layers but the first."""
    own, depth = shape.parent_block, _depth(work, shape)
    attentions = {NO_ATTENTION, own.attention, *(v for v in work.variants if v.subblock == "attn")}
    ffns = {NARROWEST, own.ffn, *(v for v in work.variants if v.subblock == "ffn")}
    pairs = {(a, f) for a in attentions for f in (own.ffn, NARROWEST)}
    pairs |= {(a, f) for a in (own.attention, NO_ATTENTION) for f in ffns}
    found = {PARENT: Architecture.of_parent(shape), ONE_LAYER: _stack(own.attention, own.attention, NARROWEST, 1)}
    return found | {_name(a, f): _stack(own.attention, a, f, depth) for a, f in sorted(pairs)}


def cost_record(work: CostWork, shape: ModelShape, times: Mapping[str, Rounds]) -> CostRecord:
    """The record from the times of `cost_architectures`.

    Raises:
        MeasurementError: a variant came out at no time at all, so noise is larger than what is measured.
    """
    depth, own, kind, one = _depth(work, shape), shape.parent_block, gguf_type(work.target), times[ONE_LAYER]

    def attention(variant: Variant, ffn: Variant) -> Rounds:
        return _less(times[_name(variant, ffn)], times[_name(NO_ATTENTION, ffn)], over=depth - 1)

    def ffn(variant: Variant, beside: Variant) -> Rounds:
        wider = _less(times[_name(beside, variant)], times[_name(beside, NARROWEST)], over=depth)
        return _less(wider, no_ffn, -1)

    def cost(variant: Variant) -> Rounds:
        if variant.subblock == "attn":
            return _mean(attention(variant, own.ffn), attention(variant, NARROWEST))
        return _mean(ffn(variant, own.attention), ffn(variant, NO_ATTENTION))

    no_ffn = _less(times[_name(NO_ATTENTION, NARROWEST)], one, over=depth - 1)
    return CostRecord(
        source="measured",
        variants={str(variant): positive_timing(str(variant), cost(variant)) for variant in work.variants},
        outside=positive_timing(OUTSIDE, _less(_less(one, attention(own.attention, NARROWEST)), no_ffn)),
        parent=timing_of(times[PARENT]),
        no_ffn=positive_timing("an FFN of zeros", no_ffn),
        hardware=work.hardware,
        weight_bytes=BYTES[kind],
        kv_bytes=CACHE_BYTES,
        engine=engine_version(),
        threads=work.target.threads,
        rounds=work.target.rounds,
    )


@contextlib.contextmanager
def exported(sources: Mapping[str, Source], target: TargetSpec) -> Iterator[dict[str, Path]]:
    """Models written as GGUF files into a temporary directory."""
    engine_version()
    with tempfile.TemporaryDirectory(prefix="puzzle-gguf-") as place:
        files = {name: Path(place) / f"{number}.gguf" for number, name in enumerate(sources)}
        for name, source in sources.items():
            export_gguf(source, files[name], gguf_type(target))
        yield files


@contextlib.contextmanager
def opened(files: Mapping[str, Path], traffic: Traffic, target: TargetSpec) -> Iterator[dict[str, LlamaModel]]:
    """The files in llama.cpp, with room for this traffic."""
    ends = [length + STEPS_PER_POINT for length in _lengths(traffic)]
    longest = max([traffic.prompt_tokens + traffic.generated_tokens, *ends])
    with contextlib.ExitStack() as stack:
        models = {}
        for name, file in files.items():
            models[name] = LlamaModel(file, traffic.batch_size, longest, target.threads)
            stack.callback(models[name].close)
        yield models


def time_models(
    models: Mapping[str, LlamaModel],
    traffic: Traffic,
    target: TargetSpec,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Rounds]:
    """Prefill and decode milliseconds of several models in every round, one warm-up round left out."""
    timers = {name: functools.partial(_times, model, traffic) for name, model in models.items()}
    return take_turns(timers, target.rounds, report)


def _times(model: LlamaModel, traffic: Traffic) -> tuple[float, float]:
    """Prefill and decode; at every length, the fastest step stands for those around it: others were disturbed."""
    prefill, lengths, total = model.prefill_ms(traffic.prompt_tokens), _lengths(traffic), 0.0
    for length in lengths:
        step = min(model.steps_ms(length, STEPS_PER_POINT))
        total += step * (traffic.generated_tokens - 1) / len(lengths)
    return prefill, total


def _lengths(traffic: Traffic) -> list[int]:
    """Where steps are timed: evenly spaced, since a step's time grows linearly with the cache."""
    steps = traffic.generated_tokens - 1
    points = min(DECODE_POINTS, steps)
    middles = [traffic.prompt_tokens + int((point + 0.5) * steps / points) for point in range(points)]
    return [max(1, middle - STEPS_PER_POINT // 2) for middle in middles]


def _depth(work: CostWork, shape: ModelShape) -> int:
    """Layers of a stack: the parent's, unless that would take too much memory, and never fewer than two."""
    block = shape.parent_block
    size = sum(variant_size(shape, variant).parameters for variant in block.subblocks)
    return max(2, min(shape.layers, int(STACK_BYTES / (size * BYTES[gguf_type(work.target)]))))


def _stack(first: Variant, attention: Variant, ffn: Variant, layers: int) -> Architecture:
    rest = BlockVariant(attention=attention, ffn=ffn)
    return Architecture(layers=(BlockVariant(attention=first, ffn=ffn), *(rest,) * (layers - 1)))


def _name(attention: Variant, ffn: Variant) -> str:
    return f"{attention}+{ffn}"


def _less(first: Rounds, second: Rounds, times: float = 1, over: float = 1) -> Rounds:
    """The first less so many times the second, over a number, round by round."""
    return {
        phase: [(a - times * b) / over for a, b in zip(first[phase], second[phase], strict=True)] for phase in first
    }


def _mean(first: Rounds, second: Rounds) -> Rounds:
    return _less(first, second, -1, 2)
