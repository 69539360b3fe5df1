"""Measured prefill and decode times on the device at hand (METHOD section 5).

One thing is ever timed: a real model with random weights, run as serving runs it, at the true batch, with a warm
cache of the right length. A variant's cost is a difference of two such models: one that has it in every layer and
nothing else, and one that has no blocks at all. So everything a forward pass does outside the blocks is counted once,
as `outside`, and the weights of a variant do not stay in the processor's cache more than they would in the child.
Models take turns in every round, so a drift of the machine's speed meets all of them.
"""

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from transformers import DynamicCache

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, ModelShape, Variant
from puzzle_core.device import use_threads
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.model.child import random_child
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.sizes import DTYPE_BYTES, variant_size
from puzzle_core.spec import TargetSpec
from puzzle_core.work import CostRecord, CostWork, Timing, TimingRecord, TimingWork, Traffic

OUTSIDE, PARENT = "outside", "parent"
DECODE_POINTS, STEPS_PER_POINT = 4, 8
STACK_BYTES = 512 * 2**20

Rounds = dict[str, list[float]]
"""Milliseconds of every round, by phase."""


def hardware_name(target: TargetSpec) -> str:
    """The device a measurement is made on, as records and keys name it.

    Raises:
        SpecError: the target asks for a GPU that is not there.
    """
    device = target_device(target)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
        return ", ".join(sorted(models)) or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def target_device(target: TargetSpec) -> torch.device:
    """The torch device of a target."""
    if target.engine == "llama.cpp":
        return torch.device("cpu")
    present = torch.cuda.is_available()
    if target.device == "cuda" and not present:
        raise SpecError("target.device is 'cuda', but torch sees no GPU here: say 'cpu', or run on the GPU machine")
    return torch.device("cuda" if present and target.device != "cpu" else "cpu")


def run(work: CostWork, parent: Parent, report: Callable[[int, int], None] | None = None) -> CostRecord:
    """Measure all variants, what lies outside, and the parent, interleaved.

    Raises:
        MeasurementError: a variant came out at no time at all, so noise is larger than what is measured.
    """
    return cost_record(work, parent, time_models(cost_models(work, parent), work.traffic, work.target, report))


def cost_models(work: CostWork, parent: Parent) -> dict[str, PuzzleForCausalLM]:
    """The models that a cost record is made from: a stack per variant, one with no blocks, and the parent."""
    device, dtype = target_device(work.target), torch_dtype(work.target.dtype)
    layers = {OUTSIDE: (EMPTY_BLOCK,) * parent.shape.layers, PARENT: Architecture.of_parent(parent.shape).layers}
    for variant in work.variants:
        copies = _copies(work, parent.shape, variant)
        rest = (EMPTY_BLOCK,) * (parent.shape.layers - copies)
        layers[str(variant)] = (EMPTY_BLOCK.with_variant(variant),) * copies + rest
    return {name: random_child(parent, Architecture(layers=stack), dtype, device) for name, stack in layers.items()}


def cost_record(work: CostWork, parent: Parent, times: Mapping[str, Rounds]) -> CostRecord:
    """The record from the times of `cost_models`; other models among them are left alone.

    Raises:
        MeasurementError: a variant came out at no time at all, so noise is larger than what is measured.
    """
    names = {str(variant): _copies(work, parent.shape, variant) for variant in work.variants}
    return CostRecord(
        source="measured",
        variants={name: _difference(name, times[name], times[OUTSIDE], copies) for name, copies in names.items()},
        outside=timing_of(times[OUTSIDE]),
        parent=timing_of(times[PARENT]),
        hardware=work.hardware,
        weight_bytes=DTYPE_BYTES[work.target.dtype],
        kv_bytes=DTYPE_BYTES[work.target.dtype],
        torch_version=torch.__version__,
        threads=work.target.threads,
        rounds=work.target.rounds,
    )


def _copies(work: CostWork, shape: ModelShape, variant: Variant) -> int:
    """In how many layers a variant's stack has it: in all, unless that would take too much memory."""
    size = variant_size(shape, variant).parameters * DTYPE_BYTES[work.target.dtype]
    return max(1, min(shape.layers, STACK_BYTES // size))


def run_timing(work: TimingWork, parent: Parent, report: Callable[[int, int], None] | None = None) -> TimingRecord:
    """Time whole models end to end, interleaved; their weights are random, for times do not depend on them."""
    device, dtype = target_device(work.target), torch_dtype(work.target.dtype)
    models = {name: random_child(parent, architecture, dtype, device) for name, architecture in work.architectures}
    times = time_models(models, work.traffic, work.target, report)
    return TimingRecord(models={name: timing_of(rounds) for name, rounds in times.items()}, hardware=work.hardware)


@torch.no_grad()
def time_models(
    models: Mapping[str, PuzzleForCausalLM],
    traffic: Traffic,
    target: TargetSpec,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Rounds]:
    """Prefill and decode milliseconds of several models in every round, one warm-up round left out."""
    use_threads(target.threads)
    timers = {
        name: functools.partial(lambda model: (_prefill_ms(model, traffic), _decode_ms(model, traffic)), model)
        for name, model in models.items()
    }
    return take_turns(timers, target.rounds, report)


def take_turns(
    timers: Mapping[str, Callable[[], tuple[float, float]]], rounds: int, report: Callable[[int, int], None] | None
) -> dict[str, Rounds]:
    """Prefill and decode milliseconds of every timer in every round, one warm-up round left out."""
    times: dict[str, Rounds] = {name: {"prefill": [], "decode": []} for name in timers}
    for number in range(rounds + 1):
        for name, timer in timers.items():
            prefill, decode = timer()
            if number:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
        if report:
            report(number, rounds)
    return times


def _prefill_ms(model: PuzzleForCausalLM, traffic: Traffic) -> float:
    ids_BT = torch.ones(traffic.batch_size, traffic.prompt_tokens, dtype=torch.long, device=model.device)
    started = _now(model.device)
    model(input_ids=ids_BT, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return (_now(model.device) - started) * 1e3


def _decode_ms(model: PuzzleForCausalLM, traffic: Traffic) -> float:
    """Steps are timed at evenly spaced cache lengths, since a step's time grows linearly with the cache."""
    steps = traffic.generated_tokens - 1
    points = min(DECODE_POINTS, steps)
    if not points:
        return 0.0
    total = 0.0
    for point in range(points):
        length = traffic.prompt_tokens + int((point + 0.5) * steps / points)
        cache = _filled_cache(model, traffic.batch_size, length - STEPS_PER_POINT // 2)
        positions = torch.full((1, 1), cache_length(cache, length), device=model.device)
        ids = torch.ones(traffic.batch_size, 1, dtype=torch.long, device=model.device)
        started = _now(model.device)
        for _ in range(STEPS_PER_POINT):
            logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
            ids, positions = logits[:, -1].argmax(-1, keepdim=True), positions + 1
        total += _now(model.device) - started
    return total * 1e3 / (points * STEPS_PER_POINT) * steps


def cache_length(cache: DynamicCache, default: int) -> int:
    """Tokens in the cache; `default` where a model has no attention and so no cache."""
    return cache.get_seq_length() or default


def _filled_cache(model: PuzzleForCausalLM, batch: int, length: int) -> DynamicCache:
    cache, index = DynamicCache(), 0
    for block, own in zip(model.model.layers, model.config.block_configs, strict=True):
        kv_heads = own["attention"]["num_key_value_heads"]
        if kv_heads:
            states = torch.randn(batch, kv_heads, max(1, length), block.self_attn.head_dim, device=model.device)
            cache.update(states.to(model.dtype), states.to(model.dtype), index)
            index += 1
    return cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _difference(name: str, stack: Rounds, outside: Rounds, copies: int) -> Timing:
    rounds = {phase: [(a - b) / copies for a, b in zip(stack[phase], outside[phase], strict=True)] for phase in stack}
    return positive_timing(name, rounds)


def positive_timing(name: str, rounds: Rounds) -> Timing:
    """The timing of what can only be a difference of measurements.

    Raises:
        MeasurementError: it came out at no time at all.
    """
    timing = timing_of(rounds)
    if timing.prefill_ms <= 0 or timing.decode_ms < 0:
        raise MeasurementError(
            f"measured time of {name} is not positive (prefill {timing.prefill_ms:.4f} ms, decode "
            f"{timing.decode_ms:.4f} ms): the machine is too noisy; stop other work, or raise target.rounds"
        )
    return timing


def timing_of(rounds: Rounds) -> Timing:
    def spread(values: list[float]) -> float:
        low, middle, high = statistics.quantiles(values, n=4)
        return (high - low) / middle if middle else 0.0

    return Timing(
        prefill_ms=statistics.median(rounds["prefill"]),
        decode_ms=statistics.median(rounds["decode"]),
        prefill_spread=spread(rounds["prefill"]),
        decode_spread=spread(rounds["decode"]),
    )
