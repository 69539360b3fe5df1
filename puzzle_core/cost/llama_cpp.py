"""Measured prefill and decode times in llama.cpp (METHOD section 5): the module of the engine `llama.cpp`.

As latency.py does, this module times whole models of random weights in turns and takes differences. T(a, f) is a stack
of n layers with attention a and FFN f. Its first layer keeps the parent's attention, since llama.cpp needs one there.

    attention a   (T(a, f) - T(none, f)) / (n - 1)      the mean over f: the parent's, and the narrowest
    FFN v         (T(a, v) - T(a, narrowest)) / n       the mean over a: the parent's, and none; plus a narrowest FFN
    narrowest     (T(none, narrowest) - one layer of it) / (n - 1)
    outside       that one layer, less its two subblocks

Where the parent's layers differ, its largest block is meant.

A subblock takes longer beside another subblock than alone (a tenth longer on small parents), because less of it stays
in the processor's cache. The means divide this extra time between the two subblocks.

Exports are lowered to llama.cpp's own layers (export/lowering.py). Each of these has an FFN: an attention without one
gets the narrowest FFN, of zeros (`no_ffn`). A linear FFN takes a layer of its own, which is counted as part of it.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from puzzle_core.architecture import NO_ATTENTION, Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.cost.engine_module import BenchRequest, BenchTimes, traffic_label
from puzzle_core.cost.llama_engine import LlamaModel, engine_version
from puzzle_core.cost.measuring import (
    OUTSIDE,
    PARENT,
    STACK_BYTES,
    STEPS_PER_POINT,
    Rounds,
    decode_lengths,
    positive_timing,
    take_turns,
    timing_of,
)
from puzzle_core.engines import GgufType
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.lowering import ZERO_WIDTH
from puzzle_core.export.source import RandomSource, Source
from puzzle_core.model.parent import Parent
from puzzle_core.progress import Report, no_report
from puzzle_core.sizes import variant_size
from puzzle_core.target import TargetSpec
from puzzle_core.work import CostRecord, CostWork, TimingRecord, TimingWork, Traffic

ONE_LAYER = "one layer"
NARROWEST = Variant("ffn", "sized", ZERO_WIDTH)
BYTES: dict[GgufType, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}
CACHE_BYTES = 2.0
"""Bytes of an entry of the cache, which is float16 by llama.cpp's default."""


def gguf_type(target: TargetSpec) -> GgufType:
    """The type of the weights in measured files."""
    return target.gguf_type or ("f32" if target.served_dtype == "float32" else "bf16")


def measure_costs(work: CostWork, parent: Parent, report: Report = no_report) -> CostRecord:
    """Measure all variants, what lies outside, and the parent, in turns.

    Raises:
        SpecError: llama-cpp-python is not installed.
        ExportError: the parent cannot be written as GGUF.
        MeasurementError: llama.cpp fails, or the time of a variant is not positive.
    """
    sources = {
        name: RandomSource(parent.directory, stack) for name, stack in cost_architectures(work, parent.shape).items()
    }
    with exported(sources, work.target) as files, opened(files, work.traffic, work.target) as models:
        return cost_record(work, parent.shape, time_models(models, work.traffic, work.target, report))


def time_architectures(work: TimingWork, parent: Parent, report: Report = no_report) -> TimingRecord:
    """Time whole models with random weights end to end, in turns."""
    sources = {name: RandomSource(parent.directory, architecture) for name, architecture in work.architectures}
    with exported(sources, work.target) as files, opened(files, work.traffic, work.target) as models:
        times = time_models(models, work.traffic, work.target, report)
    return TimingRecord(models={name: timing_of(rounds) for name, rounds in times.items()}, hardware=work.hardware)


def bench_models(request: BenchRequest, report: Callable[[str], None]) -> BenchTimes:
    """Time the models of a bench in llama.cpp."""
    target, rounds, weight_bytes = request.target, [], {}
    with exported(request.sources, target) as files:
        for traffic in request.traffics:
            report(traffic_label(traffic))
            with opened(files, traffic, target) as models:
                rounds.append(time_models(models, traffic, target))
                weight_bytes = {name: float(model.weight_bytes) for name, model in models.items()}
    return BenchTimes(f"{engine_version()}, weights in {gguf_type(target)}", weight_bytes, CACHE_BYTES, rounds)


def cost_architectures(work: CostWork, shape: ModelShape) -> dict[str, Architecture]:
    """The models that a cost record is made from: the parent, one layer, and stacks named after their block."""
    block, depth = shape.largest_block, _depth(work, shape)
    attentions = {NO_ATTENTION, block.attention, *(v for v in work.variants if v.subblock == "attn")}
    ffns = {NARROWEST, block.ffn, *(v for v in work.variants if v.subblock == "ffn")}
    pairs = {(a, f) for a in attentions for f in (block.ffn, NARROWEST)}
    pairs |= {(a, f) for a in (block.attention, NO_ATTENTION) for f in ffns}
    whole = {
        PARENT: Architecture.of_parent(shape),
        ONE_LAYER: _stack(block.attention, block.attention, NARROWEST, 1),
    }
    return whole | {_name(a, f): _stack(block.attention, a, f, depth) for a, f in sorted(pairs)}


def cost_record(work: CostWork, shape: ModelShape, times: Mapping[str, Rounds]) -> CostRecord:
    """The record from the times of `cost_architectures`.

    Raises:
        MeasurementError: the time of a variant is not positive, so the noise is larger than what is measured.
    """
    depth, block, one_layer = _depth(work, shape), shape.largest_block, times[ONE_LAYER]

    def attention(variant: Variant, ffn: Variant) -> Rounds:
        return _less(times[_name(variant, ffn)], times[_name(NO_ATTENTION, ffn)], over=depth - 1)

    def ffn(variant: Variant, beside: Variant) -> Rounds:
        wider = _less(times[_name(beside, variant)], times[_name(beside, NARROWEST)], over=depth)
        return _less(wider, no_ffn, -1)

    def cost(variant: Variant) -> Rounds:
        if variant.subblock == "attn":
            return _mean(attention(variant, block.ffn), attention(variant, NARROWEST))
        return _mean(ffn(variant, block.attention), ffn(variant, NO_ATTENTION))

    no_ffn = _less(times[_name(NO_ATTENTION, NARROWEST)], one_layer, over=depth - 1)
    without_attention = _less(one_layer, attention(block.attention, NARROWEST))
    return CostRecord(
        source="measured",
        variants={str(variant): positive_timing(str(variant), cost(variant)) for variant in work.variants},
        outside=positive_timing(OUTSIDE, _less(without_attention, no_ffn)),
        parent=timing_of(times[PARENT]),
        no_ffn=positive_timing("an FFN of zeros", no_ffn),
        hardware=work.hardware,
        weight_bytes=BYTES[gguf_type(work.target)],
        kv_bytes=CACHE_BYTES,
        engine=engine_version(),
        threads=work.target.threads,
        rounds=work.target.rounds,
    )


@contextlib.contextmanager
def exported(sources: Mapping[str, Source], target: TargetSpec) -> Iterator[dict[str, Path]]:
    """Write models as GGUF files into a temporary directory, after checking that llama.cpp is installed."""
    engine_version()
    with tempfile.TemporaryDirectory(prefix="puzzle-gguf-") as directory:
        files = {name: Path(directory) / f"{number}.gguf" for number, name in enumerate(sources)}
        for name, source in sources.items():
            export_gguf(source, files[name], gguf_type(target))
        yield files


@contextlib.contextmanager
def opened(files: Mapping[str, Path], traffic: Traffic, target: TargetSpec) -> Iterator[dict[str, LlamaModel]]:
    """Open the files in llama.cpp, with caches that are large enough for this traffic."""
    ends = [length + STEPS_PER_POINT for length in _first_lengths(traffic)]
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
    report: Report = no_report,
) -> dict[str, Rounds]:
    """Prefill and decode milliseconds of several models in every round, without the warm-up round."""
    timers = {name: functools.partial(_times, model, traffic) for name, model in models.items()}
    return take_turns(timers, target.rounds, report)


def _times(model: LlamaModel, traffic: Traffic) -> tuple[float, float]:
    """Prefill and decode milliseconds. The fastest step at every length counts: slower ones were disturbed."""
    prefill, lengths, total = model.prefill_ms(traffic.prompt_tokens), _first_lengths(traffic), 0.0
    for length in lengths:
        step = min(model.steps_ms(length, STEPS_PER_POINT))
        total += step * (traffic.generated_tokens - 1) / len(lengths)
    return prefill, total


def _first_lengths(traffic: Traffic) -> list[int]:
    """Cache lengths before the first of the steps that are timed around each of `decode_lengths`."""
    return [max(1, length - STEPS_PER_POINT // 2) for length in decode_lengths(traffic)]


def _depth(work: CostWork, shape: ModelShape) -> int:
    """Layers of a stack: as many as the parent has, unless these are too large, and at least two."""
    block = shape.largest_block
    size = sum(variant_size(shape, variant).parameters for variant in block.subblocks)
    return max(2, min(shape.layers, int(STACK_BYTES / (size * BYTES[gguf_type(work.target)]))))


def _stack(first: Variant, attention: Variant, ffn: Variant, layers: int) -> Architecture:
    rest = BlockVariant(attention=attention, ffn=ffn)
    return Architecture(layers=(BlockVariant(attention=first, ffn=ffn), *(rest,) * (layers - 1)))


def _name(attention: Variant, ffn: Variant) -> str:
    return f"{attention}+{ffn}"


def _less(first: Rounds, second: Rounds, times: float = 1, over: float = 1) -> Rounds:
    """(first - times * second) / over, round by round."""
    return {
        phase: [(a - times * b) / over for a, b in zip(first[phase], second[phase], strict=True)] for phase in first
    }


def _mean(first: Rounds, second: Rounds) -> Rounds:
    return _less(first, second, -1, 2)
