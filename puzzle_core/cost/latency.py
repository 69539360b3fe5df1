"""Measured prefill and decode times in torch (METHOD section 5): the module of the engine `torch`.

Only whole models are timed: with random weights, run as serving runs them, at the true batch, with a warm cache of the
right length. A variant's cost is the difference between two models: one that has the variant in every layer and nothing
else, and one that has no blocks. So what a forward pass does outside the blocks is counted once, as `outside`, and the
weights of a variant stay in the processor's cache no more than they do in a child.
"""

import functools
import time
from collections.abc import Callable, Mapping

import torch
from transformers import DynamicCache

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, ModelShape, Variant
from puzzle_core.cost.engine_module import BenchRequest, BenchTimes, traffic_label
from puzzle_core.cost.measuring import (
    OUTSIDE,
    PARENT,
    STACK_BYTES,
    STEPS_PER_POINT,
    Rounds,
    decode_lengths,
    positive_timing,
    take_turns,
    target_device,
    timing_of,
)
from puzzle_core.device import use_threads
from puzzle_core.formats.block_configs import block_config
from puzzle_core.model.child import random_child
from puzzle_core.model.child_config import child_config
from puzzle_core.model.parent import Parent, random_model, served_as, torch_dtype
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.progress import Report, no_report
from puzzle_core.sizes import DTYPE_BYTES, variant_size
from puzzle_core.target import TargetSpec
from puzzle_core.work import CostRecord, CostWork, Timing, TimingRecord, TimingWork, Traffic


def engine_version() -> str:
    """`torch` with its version."""
    return f"torch {torch.__version__}"


def measure_costs(work: CostWork, parent: Parent, report: Report = no_report) -> CostRecord:
    """Measure all variants, what lies outside, and the parent, in turns.

    Raises:
        MeasurementError: the time of a variant is not positive, so the noise is larger than what is measured.
    """
    return cost_record(work, parent, time_models(cost_models(work, parent), work.traffic, work.target, report))


def cost_models(work: CostWork, parent: Parent) -> dict[str, PuzzleForCausalLM]:
    """The models that a cost record is made from: a stack per variant, one with no blocks, and the parent."""
    device, dtype = target_device(work.target), torch_dtype(work.target.served_dtype)
    layers = {OUTSIDE: (EMPTY_BLOCK,) * parent.shape.layers, PARENT: Architecture.of_parent(parent.shape).layers}
    for variant in work.variants:
        copies, block = _copies(work, parent.shape, variant), EMPTY_BLOCK.with_variant(variant)
        layers[str(variant)] = tuple(block if layer in copies else EMPTY_BLOCK for layer in range(parent.shape.layers))
    return {name: random_child(parent, Architecture(layers=stack), dtype, device) for name, stack in layers.items()}


def cost_record(work: CostWork, parent: Parent, times: Mapping[str, Rounds]) -> CostRecord:
    """The record from the times of `cost_models`; other models among them are ignored.

    Raises:
        MeasurementError: the time of a variant is not positive, so the noise is larger than what is measured.
    """
    copies = {str(variant): len(_copies(work, parent.shape, variant)) for variant in work.variants}
    return CostRecord(
        source="measured",
        variants={name: _difference(name, times[name], times[OUTSIDE], number) for name, number in copies.items()},
        outside=timing_of(times[OUTSIDE]),
        parent=timing_of(times[PARENT]),
        hardware=work.hardware,
        weight_bytes=DTYPE_BYTES[work.target.served_dtype],
        kv_bytes=DTYPE_BYTES[work.target.served_dtype],
        torch_version=torch.__version__,
        threads=work.target.threads,
        rounds=work.target.rounds,
    )


def _copies(work: CostWork, shape: ModelShape, variant: Variant) -> list[int]:
    """The layers of a variant's stack that have it: all where it runs without a shorter window of the layer's own,
    unless these are too large."""
    size = variant_size(shape, variant).parameters * DTYPE_BYTES[work.target.served_dtype]
    layers = [layer for layer in range(shape.layers) if shape.in_layer(layer, variant) == variant]
    return layers[: max(1, STACK_BYTES // size)]


def _difference(name: str, stack: Rounds, outside: Rounds, copies: int) -> Timing:
    """The time of one variant, from a stack of so many copies and a model without blocks, round by round."""
    rounds = {phase: [(a - b) / copies for a, b in zip(stack[phase], outside[phase], strict=True)] for phase in stack}
    return positive_timing(name, rounds)


def time_architectures(work: TimingWork, parent: Parent, report: Report = no_report) -> TimingRecord:
    """Time whole models with random weights end to end, in turns."""
    device, dtype = target_device(work.target), torch_dtype(work.target.served_dtype)
    models = {name: random_child(parent, architecture, dtype, device) for name, architecture in work.architectures}
    times = time_models(models, work.traffic, work.target, report)
    return TimingRecord(models={name: timing_of(rounds) for name, rounds in times.items()}, hardware=work.hardware)


def bench_models(request: BenchRequest, report: Callable[[str], None]) -> BenchTimes:
    """Time the models of a bench in torch."""
    device, dtype, models = target_device(request.target), torch_dtype(request.target.served_dtype), {}
    for name, source in request.sources.items():
        blocks = [block_config(block) for block in source.architecture.layers]
        model = random_model(child_config(source.config, blocks))
        models[name] = served_as(model, dtype, device).requires_grad_(False)
    rounds = []
    for traffic in request.traffics:
        report(traffic_label(traffic))
        rounds.append(time_models(models, traffic, request.target))
    weight_bytes = {
        name: float(sum(p.numel() * p.element_size() for p in model.parameters())) for name, model in models.items()
    }
    return BenchTimes(engine_version(), weight_bytes, DTYPE_BYTES[request.target.served_dtype], rounds)


@torch.no_grad()
def time_models(
    models: Mapping[str, PuzzleForCausalLM],
    traffic: Traffic,
    target: TargetSpec,
    report: Report = no_report,
) -> dict[str, Rounds]:
    """Prefill and decode milliseconds of several models in every round, without the warm-up round."""
    use_threads(target.threads)
    timers = {
        name: functools.partial(lambda model: (_prefill_ms(model, traffic), _decode_ms(model, traffic)), model)
        for name, model in models.items()
    }
    return take_turns(timers, target.rounds, report)


def _prefill_ms(model: PuzzleForCausalLM, traffic: Traffic) -> float:
    ids_BT = torch.ones(traffic.batch_size, traffic.prompt_tokens, dtype=torch.long, device=model.device)
    started = _now(model.device)
    model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return (_now(model.device) - started) * 1e3


def _decode_ms(model: PuzzleForCausalLM, traffic: Traffic) -> float:
    """Milliseconds of all decode steps, from steps that are timed around `decode_lengths`."""
    lengths, total = decode_lengths(traffic), 0.0
    for length in lengths:
        cache = _filled_cache(model, traffic.batch_size, length - STEPS_PER_POINT // 2)
        positions = torch.full((1, 1), cache_length(cache, length), device=model.device)
        ids = torch.ones(traffic.batch_size, 1, dtype=torch.long, device=model.device)
        started = _now(model.device)
        for _ in range(STEPS_PER_POINT):
            logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
            ids, positions = logits[:, -1].argmax(-1, keepdim=True), positions + 1
        total += _now(model.device) - started
    return total * 1e3 / (len(lengths) * STEPS_PER_POINT) * (traffic.generated_tokens - 1) if lengths else 0.0


def cache_length(cache: DynamicCache, default: int) -> int:
    """Tokens in the cache; `default` where a model has no attention and so no cache."""
    return cache.get_seq_length() or default


def _filled_cache(model: PuzzleForCausalLM, batch: int, length: int) -> DynamicCache:
    """A cache of random keys and values: per attention, (batch, KV heads, length, head width)."""
    cache, index = model.model.cache(), 0
    for block, config in zip(model.model.layers, model.config.block_configs, strict=True):
        kv_heads = config["attention"]["num_key_value_heads"]
        if kv_heads:
            head_dim = block.attention_subblock.head_dim
            states = torch.randn(batch, kv_heads, max(1, length), head_dim, device=model.device)
            cache.update(states.to(model.dtype), states.to(model.dtype), index)
            index += 1
    return cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
