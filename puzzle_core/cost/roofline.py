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
from puzzle_core.precisions import LAYOUTS, Products
from puzzle_core.quantities import parse_bandwidth, parse_duration, parse_rate
from puzzle_core.sizes import check_devices, kv_copies, variant_size
from puzzle_core.target import Efficiency, HardwareSpec, TargetSpec
from puzzle_core.work import CostRecord, Timing, Traffic

RESIDUAL_BYTES = 2
"""Least bytes per channel of the residual stream, which is what devices add up: products of 8 bits give 16."""
LOGIT_BYTES = 4


class Pass(NamedTuple):
    """One forward pass: its sequences, new tokens per sequence, and the least and the largest context of a new one.

    Sequences are a mean where a batch is shared out over passes, so they need not be whole. A decode step stands for
    all of a generation, whose contexts grow by one token at a time.
    """

    sequences: float
    new_tokens: int
    first_context: int
    last_context: int
    decoding: bool

    @property
    def tokens(self) -> float:
        """Tokens of the pass, N."""
        return self.sequences * self.new_tokens

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
    """The rates of a hardware specification, with what kernels reach of them."""

    hardware: HardwareSpec
    efficiency: Efficiency

    def kernel_s(self, operations: float, moved_bytes: float, products: Products, exposed: float = 0.0) -> float:
        """Seconds of one kernel; operations and bytes are those of the whole group.

        Args:
            exposed: share of the memory's time that computing does not hide.
        """
        devices = self.hardware.tensor_parallel
        peak = parse_rate(getattr(self.hardware.peak_rates, products)).value * self.efficiency.compute
        bandwidth = parse_bandwidth(self.hardware.bandwidth).value * self.efficiency.bandwidth
        memory_s = moved_bytes / (devices * bandwidth)
        return max(operations / (devices * peak) + exposed * memory_s, memory_s)

    def all_reduce_s(self, tokens: float, hidden: int) -> float:
        """Seconds of the all-reduce of a subblock's outputs over the group: a ring that does not overlap compute."""
        devices = self.hardware.tensor_parallel
        return 0.0 if devices == 1 else self._send_s(2 * (devices - 1) / devices * tokens * hidden)

    def pass_on_s(self, tokens: float, hidden: int) -> float:
        """Seconds that the states of a pass take from stage to stage of a pipeline."""
        return (self.hardware.pipeline_parallel - 1) * self._send_s(tokens * hidden)

    def _send_s(self, channels: float) -> float:
        link = self.hardware.interconnect
        if link is None:
            return 0.0
        channel_bytes = max(RESIDUAL_BYTES, LAYOUTS[self.hardware.activations].bytes)
        bandwidth = parse_bandwidth(link.bandwidth).value * self.efficiency.link
        return channels * channel_bytes / bandwidth + parse_duration(link.latency).value

    @property
    def overhead_s(self) -> float:
        """Fixed seconds per subblock and pass."""
        return self.efficiency.overhead_us * 1e-6


def roofline(shape: ModelShape, variants: Iterable[Variant], traffic: Traffic, target: TargetSpec) -> CostRecord:
    """Prefill and decode times of subblock variants, of what lies outside the blocks, and of the parent.

    Args:
        variants: no-ops take no time and may be left out.
        traffic: at a batch size; decoding are `generated_tokens - 1` steps, whose context grows.

    Raises:
        SpecError: the target has no hardware figures, or its devices cannot share the model.
    """
    if target.hardware is None:
        raise SpecError(
            f"target {target.name} has no figures to compute from: give it `costs: roofline` and `hardware`"
        )
    hardware = target.hardware
    check_devices(shape, hardware.tensor_parallel, hardware.pipeline_parallel)
    device = Device(hardware, target.efficiency)
    passes = passes_of(traffic, hardware)

    def timing(variant: Variant) -> Timing:
        return passes.timing(partial(subblock_s, device, shape, variant))

    outside = passes.timing(partial(outside_s, device, shape))
    subblocks = Counter(
        shape.in_layer(layer, variant)
        for layer in range(shape.layers)
        for variant in shape.parent_block(layer).subblocks
        if not variant.is_empty
    )
    blocks = [(count, timing(variant)) for variant, count in subblocks.items()]
    layout = LAYOUTS[hardware.weights]
    return CostRecord(
        source="roofline",
        variants={str(variant): timing(variant) for variant in variants if not variant.is_empty},
        outside=outside,
        parent=Timing(
            prefill_ms=outside.prefill_ms + sum(count * subblock.prefill_ms for count, subblock in blocks),
            decode_ms=outside.decode_ms + sum(count * subblock.decode_ms for count, subblock in blocks),
        ),
        hardware=f"{hardware.devices} x {hardware.device}",
        weight_bytes=layout.bytes,
        embedding_bytes=layout.embedding_bytes,
        kv_bytes=LAYOUTS[hardware.kv_cache].bytes,
        tensor_parallel=hardware.tensor_parallel,
    )


def subblock_s(device: Device, shape: ModelShape, variant: Variant, work: Pass) -> float:
    """Seconds of one subblock in one pass."""
    hardware, size = device.hardware, variant_size(shape, variant)
    channels = 2 * shape.hidden + variant.row.inner_channels(shape, variant.size)
    moved = work.tokens * channels * LAYOUTS[hardware.activations].bytes
    seconds = device.kernel_s(
        operations=2 * size.parameters * work.tokens,
        moved_bytes=size.parameters * LAYOUTS[hardware.weights].bytes + moved,
        products=hardware.linear_products,
        exposed=device.efficiency.exposed,
    )
    if size.kv_entries_per_token:
        seconds += _attend_s(device, shape, variant, work)
    return seconds + device.all_reduce_s(work.tokens, shape.hidden) + device.overhead_s


def outside_s(device: Device, shape: ModelShape, work: Pass) -> float:
    """Seconds of embedding, final norm, head and sampling in one pass; only each sequence's last token has logits."""
    hardware, layout = device.hardware, LAYOUTS[device.hardware.weights]
    embedding = work.tokens * shape.hidden * (layout.embedding_bytes + LAYOUTS[hardware.activations].bytes)
    head = shape.vocabulary * shape.hidden
    products = hardware.linear_products if layout.embedding_bits is None else _sixteen_bits(hardware)
    seconds = device.kernel_s(
        operations=2 * head * work.sequences,
        moved_bytes=head * layout.embedding_bytes + embedding + 2 * work.sequences * shape.vocabulary * LOGIT_BYTES,
        products=products,
        exposed=device.efficiency.exposed,
    )
    return seconds + device.pass_on_s(work.tokens, shape.hidden) + device.efficiency.pass_us * 1e-6


def _sixteen_bits(hardware: HardwareSpec) -> Products:
    """The rate of a head in 16 bits, where the device has one."""
    rates = hardware.peak_rates
    return "bfloat16" if rates.bfloat16 else "float16" if rates.float16 else hardware.linear_products


def _attend_s(device: Device, shape: ModelShape, variant: Variant, work: Pass) -> float:
    """Seconds of softmax(Q K) V: the cache is read once per pass, and new entries are written."""
    hardware, row = device.hardware, variant.row
    entries = row.kv_entries(shape, variant.size)
    context = work.context(variant)
    cached = context if work.decoding else work.new_tokens
    seconds = device.kernel_s(
        operations=work.tokens * row.context_operations(shape, variant.size) * context,
        moved_bytes=work.sequences
        * cached
        * entries
        * kv_copies(variant.kv_heads, hardware.tensor_parallel)
        * LAYOUTS[hardware.kv_cache].bytes,
        products=hardware.attention_products,
    )
    return seconds + (work.sequences * device.efficiency.sequence_us * 1e-6 if work.decoding else 0.0)


class Passes(NamedTuple):
    """The forward passes of a batch: how many prefills and of what, and how many decode steps of what."""

    prefills: float
    prefill: Pass
    steps: int
    step: Pass

    def timing(self, seconds: Callable[[Pass], float]) -> Timing:
        """The times of all prefills and of all decode steps."""
        return Timing(
            prefill_ms=1e3 * self.prefills * seconds(self.prefill), decode_ms=1e3 * self.steps * seconds(self.step)
        )


def passes_of(traffic: Traffic, hardware: HardwareSpec) -> Passes:
    """The passes of a batch, at most `max_tokens` tokens each, at their mean contexts: attention is linear in them.

    A pipeline's stages work on one part of the batch each, so a step of the whole batch takes as long as one part
    takes through all stages.
    """
    prompt, generated = traffic.prompt_tokens, traffic.generated_tokens
    sequences = max(1.0, traffic.batch_size / hardware.pipeline_parallel)
    prefills = max(1.0, sequences * prompt / hardware.serving.max_tokens)
    return Passes(
        prefills=prefills,
        prefill=Pass(sequences / prefills, prompt, 1, prompt, decoding=False),
        steps=generated - 1,
        step=Pass(sequences, 1, prompt + 1, prompt + max(1, generated - 1), decoding=True),
    )
