"""Times computed from the figures of a data sheet (METHOD section 5). No torch.

Every subblock is one kernel or two. A kernel takes the longer of two times: its operations over the compute rate, and
its bytes over the memory bandwidth. docs/targets.md has every formula and assumption.

Legend: N tokens of one forward pass, all sequences together. Everything is per device of the tensor-parallel group.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.errors import SpecError
from puzzle_core.quantities import parse_bandwidth, parse_duration, parse_rate
from puzzle_core.sizes import variant_size
from puzzle_core.target import PRECISION_BYTES, HardwareSpec, Precision, TargetSpec
from puzzle_core.work import CostRecord, Timing, Traffic

RESIDUAL_BYTES = 2
"""Least bytes per channel of the residual stream, which is what devices add up: products of 8 bits give 16."""
LOGIT_BYTES = 4


class Pass(NamedTuple):
    """One forward pass of a batch: new tokens per sequence, and the least and the largest context of a new one.

    A decode step stands for all of a generation, whose contexts grow by one token at a time.
    """

    batch_size: int
    new_tokens: int
    first_context: int
    last_context: int
    decoding: bool

    @property
    def tokens(self) -> int:
        """Tokens of the pass, N."""
        return self.batch_size * self.new_tokens

    def context(self, variant: Variant) -> float:
        """Tokens that a new one attends to on average: those of its context that the variant's window holds."""
        first, last = self.first_context, self.last_context
        window = variant.seen(last)
        if window == last:
            return (first + last) / 2
        short = max(0, window - first)  # contexts that are shorter than the window
        return (short * (first + window - 1) / 2 + (last - first + 1 - short) * window) / (last - first + 1)


@dataclass(frozen=True)
class Device:
    """The rates of a hardware specification, with the share of them that kernels reach."""

    hardware: HardwareSpec

    def kernel_s(self, operations: float, moved_bytes: float, precision: Precision, decoding: bool) -> float:
        """Seconds of one kernel; operations and bytes are those of the whole group."""
        efficiency, devices = self.hardware.efficiency, self.hardware.tensor_parallel
        reached = efficiency.decode_compute if decoding else efficiency.prefill_compute
        peak = parse_rate(getattr(self.hardware.peak_rates, precision)).value
        bandwidth = parse_bandwidth(self.hardware.bandwidth).value * efficiency.bandwidth
        return max(operations / (devices * peak * reached), moved_bytes / (devices * bandwidth))

    def all_reduce_s(self, tokens: int, hidden: int) -> float:
        """Seconds of the all-reduce of a subblock's outputs over the group: a ring that does not overlap compute."""
        link, devices = self.hardware.interconnect, self.hardware.tensor_parallel
        if devices == 1 or link is None:
            return 0.0
        channel_bytes = max(RESIDUAL_BYTES, PRECISION_BYTES[self.hardware.activations])
        sent_bytes = 2 * (devices - 1) / devices * tokens * hidden * channel_bytes
        bandwidth = parse_bandwidth(link.bandwidth).value * self.hardware.efficiency.bandwidth
        return sent_bytes / bandwidth + parse_duration(link.latency).value

    @property
    def overhead_s(self) -> float:
        """Fixed seconds per subblock and pass."""
        return self.hardware.efficiency.overhead_us * 1e-6


def roofline(shape: ModelShape, variants: Iterable[Variant], traffic: Traffic, target: TargetSpec) -> CostRecord:
    """Prefill and decode times of subblock variants, of what lies outside the blocks, and of the parent.

    Args:
        variants: no-ops take no time and may be left out.
        traffic: at a batch size; decoding are `generated_tokens - 1` steps, whose context grows.

    Raises:
        SpecError: the target has no hardware figures.
    """
    if target.hardware is None:
        raise SpecError(
            f"target {target.name} has no figures to compute from: give it `costs: roofline` and `hardware`"
        )
    hardware = target.hardware
    device = Device(hardware)

    def timing(variant: Variant) -> Timing:
        return _timing(traffic, partial(subblock_s, device, shape, variant))

    outside = _timing(traffic, partial(outside_s, device, shape))
    subblocks = Counter(
        shape.in_layer(layer, variant)
        for layer in range(shape.layers)
        for variant in shape.parent_block(layer).subblocks
        if not variant.is_empty
    )
    blocks = [(count, timing(variant)) for variant, count in subblocks.items()]
    return CostRecord(
        source="roofline",
        variants={str(variant): timing(variant) for variant in variants if not variant.is_empty},
        outside=outside,
        parent=Timing(
            prefill_ms=outside.prefill_ms + sum(count * subblock.prefill_ms for count, subblock in blocks),
            decode_ms=outside.decode_ms + sum(count * subblock.decode_ms for count, subblock in blocks),
        ),
        hardware=f"{hardware.tensor_parallel} x {hardware.device}",
        weight_bytes=PRECISION_BYTES[hardware.weights],
        kv_bytes=PRECISION_BYTES[hardware.kv_cache],
    )


def subblock_s(device: Device, shape: ModelShape, variant: Variant, work: Pass) -> float:
    """Seconds of one subblock in one pass."""
    hardware, size = device.hardware, variant_size(shape, variant)
    weight_bytes, channel_bytes = PRECISION_BYTES[hardware.weights], PRECISION_BYTES[hardware.activations]
    channels = 2 * shape.hidden + variant.row.inner_channels(shape, variant.size)
    seconds = device.kernel_s(
        operations=2 * size.parameters * work.tokens,
        moved_bytes=size.parameters * weight_bytes + work.tokens * channels * channel_bytes,
        precision=hardware.linear_precision,
        decoding=work.decoding,
    )
    if size.kv_entries_per_token:
        seconds += _attend_s(device, shape, variant, work)
    return seconds + device.all_reduce_s(work.tokens, shape.hidden) + device.overhead_s


def outside_s(device: Device, shape: ModelShape, work: Pass) -> float:
    """Seconds of embedding, final norm, head and sampling in one pass; only each sequence's last token has logits."""
    hardware, batch = device.hardware, work.batch_size
    weight_bytes, channel_bytes = PRECISION_BYTES[hardware.weights], PRECISION_BYTES[hardware.activations]
    embedding = work.tokens * shape.hidden * (weight_bytes + channel_bytes)
    head = shape.vocabulary * shape.hidden
    return device.overhead_s + device.kernel_s(
        operations=2 * head * batch,
        moved_bytes=head * weight_bytes + embedding + 2 * batch * shape.vocabulary * LOGIT_BYTES,
        precision=hardware.linear_precision,
        decoding=work.decoding,
    )


def _attend_s(device: Device, shape: ModelShape, variant: Variant, work: Pass) -> float:
    """Seconds of softmax(Q K) V: the cache is read once per pass, and new entries are written."""
    hardware, row = device.hardware, variant.row
    entries = row.kv_entries(shape, variant.size)
    copies = max(1.0, hardware.tensor_parallel / variant.kv_heads)  # fewer KV heads than devices: each needs one
    context = work.context(variant)
    cached = context if work.decoding else work.new_tokens
    return device.kernel_s(
        operations=work.tokens * row.context_operations(shape, variant.size) * context,
        moved_bytes=work.batch_size * cached * entries * copies * PRECISION_BYTES[hardware.kv_cache],
        precision=hardware.attention_precision,
        decoding=work.decoding,
    )


def _timing(traffic: Traffic, seconds: Callable[[Pass], float]) -> Timing:
    """The times of a prefill and of all decode steps, taken at the mean context: attention is linear in it."""
    batch, prompt, generated = traffic.batch_size, traffic.prompt_tokens, traffic.generated_tokens
    prefill = Pass(batch, prompt, 1, prompt, decoding=False)
    step = Pass(batch, 1, prompt + 1, prompt + max(1, generated - 1), decoding=True)
    return Timing(prefill_ms=1e3 * seconds(prefill), decode_ms=1e3 * (generated - 1) * seconds(step))
