"""What a target serves: sequences that fit, throughput, and the times of a token, from roofline costs. No torch.

Static batching prefills a batch and then decodes it. Under continuous batching sequences come and go, so prefills of
others lie between the tokens of each: a token takes (prefill + decode) / generated tokens of a whole batch, and a first
token one prompt's prefill, a step, and the wait for other prompts.
"""

import math
from collections import Counter
from typing import NamedTuple

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.batching import reserved_tokens, waiting_prompts
from puzzle_core.cost.measurements import Measurement
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import SpecError
from puzzle_core.precisions import LAYOUTS
from puzzle_core.sizes import kv_entries, parameter_bytes
from puzzle_core.target import HardwareSpec, TargetSpec
from puzzle_core.work import Timing, Traffic


class Served(NamedTuple):
    """A batch that is served: its size, generated tokens per second of all devices, and milliseconds per token."""

    batch_size: int
    tokens_per_s: float
    first_token_ms: float
    token_ms: float


def weight_bytes(shape: ModelShape, architecture: Architecture, hardware: HardwareSpec) -> float:
    """Bytes of all weights, those of embedding and head in their own precision."""
    layout = LAYOUTS[hardware.weights]
    return parameter_bytes(shape, architecture, layout.bytes, layout.embedding_bytes)


def cache_bytes(shape: ModelShape, architecture: Architecture, hardware: HardwareSpec, tokens: float) -> float:
    """Bytes of the KV cache of a sequence of so many tokens, on all devices together: copies of heads included."""
    entries = kv_entries(shape, architecture, math.ceil(tokens), hardware.tensor_parallel)
    return entries * LAYOUTS[hardware.kv_cache].bytes


def largest_batch(
    shape: ModelShape, architecture: Architecture, hardware: HardwareSpec, prompt_tokens: int, generated_tokens: int
) -> int:
    """The most sequences that fit at a time.

    Raises:
        SpecError: the weights and one sequence do not fit.
    """
    weights = weight_bytes(shape, architecture, hardware)
    held = reserved_tokens(hardware.serving.reservation, prompt_tokens, generated_tokens)
    sequence = cache_bytes(shape, architecture, hardware, held)
    free = hardware.usable_bytes - weights
    if free < max(sequence, 1):
        raise SpecError(
            f"{hardware.devices} x {hardware.device} have {hardware.usable_bytes / 1e9:.1f} GB for weights and cache, "
            f"and the model takes {weights / 1e9:.1f} GB and {sequence / 1e9:.2f} GB per sequence"
        )
    most = hardware.serving.max_sequences or 10**9
    return min(most, int(free // sequence) if sequence else most)


def serve(
    shape: ModelShape,
    architecture: Architecture,
    target: TargetSpec,
    prompt_tokens: int,
    generated_tokens: int,
    *,
    batch_size: int | None = None,
    continuous: bool = True,
) -> Served:
    """The figures of a model at a batch size, or with as many sequences as fit.

    Raises:
        SpecError: the target has no figures, or the model does not fit.
    """
    if target.hardware is None:
        raise SpecError(f"target {target.name} has no figures to compute from")
    batch = batch_size or largest_batch(shape, architecture, target.hardware, prompt_tokens, generated_tokens)

    def times(batch: int) -> Timing:
        return model_times(
            shape,
            architecture,
            target,
            Traffic(prompt_tokens=prompt_tokens, generated_tokens=generated_tokens, batch_size=batch),
        )

    whole = times(batch)
    runtime_ms = whole.prefill_ms + whole.decode_ms
    steps = max(1, generated_tokens - 1)
    if continuous:
        wait = waiting_prompts(whole.prefill_ms, runtime_ms)
        first = times(1).prefill_ms * (1 + wait) + whole.decode_ms / steps
        token = runtime_ms / generated_tokens
    else:
        first, token = whole.prefill_ms, whole.decode_ms / steps
    return Served(batch, 1e3 * batch * generated_tokens / runtime_ms, first, token)


def model_times(shape: ModelShape, architecture: Architecture, target: TargetSpec, traffic: Traffic) -> Timing:
    """Prefill and decode of a whole model."""
    counts = Counter(
        shape.in_layer(layer, variant)
        for layer, block in enumerate(architecture.layers)
        for variant in block.subblocks
        if not variant.is_empty
    )
    costs = roofline(shape, counts, traffic, target)
    parts = [(1, costs.outside), *((count, costs.variants[str(variant)]) for variant, count in counts.items())]
    return Timing(
        prefill_ms=sum(count * timing.prefill_ms for count, timing in parts),
        decode_ms=sum(count * timing.decode_ms for count, timing in parts),
    )


def on_devices(target: TargetSpec, tensor_parallel: int) -> TargetSpec:
    """The target with its model shared over so many devices.

    Raises:
        SpecError: there are several, and the target says nothing of the link between them.
    """
    assert target.hardware, "the roofline needs figures"
    if tensor_parallel > 1 and target.hardware.interconnect is None:
        raise SpecError(f"target {target.name} has no interconnect, so {tensor_parallel} of it cannot share a model")
    return target.model_copy(
        update={"hardware": target.hardware.model_copy(update={"tensor_parallel": tensor_parallel})}
    )


def predict(row: Measurement, shape: ModelShape, target: TargetSpec, architecture: Architecture | None = None) -> float:
    """Our figure for what a row measured, in its unit.

    Raises:
        SpecError: the model does not fit, or so many devices cannot share it.
    """
    found = serve(
        shape,
        architecture or Architecture.of_parent(shape),
        on_devices(target, row.tensor_parallel),
        row.input_tokens,
        row.output_tokens,
        batch_size=row.concurrency,
        continuous=row.batching == "continuous",
    )
    return {
        "output_tokens_per_s": found.tokens_per_s,
        "output_tokens_per_s_per_gpu": found.tokens_per_s / row.tensor_parallel,
        "time_to_first_token_ms": found.first_token_ms,
        "inter_token_latency_ms": found.token_ms,
    }[row.quantity]
