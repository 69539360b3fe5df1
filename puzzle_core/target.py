"""Hardware targets: the device, precision and engine that costs hold for, and where the costs come from.

A target is part of a run's spec or a file of its own (deployments/targets/, docs/targets.md). Its costs are measured on
this machine, computed from the figures of a data sheet (cost/roofline.py), or imported as a table. No torch.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from puzzle_core.engines import ENGINES, GgufType, TargetEngine, engines_with
from puzzle_core.precisions import LAYOUTS, Precision, Products
from puzzle_core.quantities import parse_bandwidth, parse_duration, parse_memory, parse_rate
from puzzle_core.records import Record
from puzzle_core.yaml_file import parse_record, read_keys, resolve_path

Dtype = Literal["float32", "bfloat16"]
ComputeDtype = Literal["float32", "bfloat16", "auto"]
"""`auto` is bfloat16 where the machine has fast products of it (`device.fast_dtype`); a plan has no `auto` left."""
_NAME = r"^[A-Za-z0-9]([A-Za-z0-9 ._+-]*[A-Za-z0-9_+-])?"
Name = Annotated[str, Field(pattern=_NAME + "$", max_length=100, json_schema_extra={"pattern": _NAME + r"(?![\s\S])"})]
"""Becomes part of names of runs, models and files: short, no slash, no newline, no dot or space at an end."""
Positive = Annotated[int, Field(gt=0, le=10**15)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Share = Annotated[float, Field(gt=0, le=1)]
Memory = Annotated[str, BeforeValidator(parse_memory.check), Field(json_schema_extra=parse_memory.form)]
Bandwidth = Annotated[str, BeforeValidator(parse_bandwidth.check), Field(json_schema_extra=parse_bandwidth.form)]
Rate = Annotated[str, BeforeValidator(parse_rate.check), Field(json_schema_extra=parse_rate.form)]
Duration = Annotated[str, BeforeValidator(parse_duration.check), Field(json_schema_extra=parse_duration.form)]


FORMULAS = 2
"""Version of the formulas of roofline costs, in their keys: raised when they change."""


class PeakRates(Record):
    """Peak rates of dense matrix products, by the precision of their operands; none if the device has no fast path."""

    float32: Rate | None = None
    bfloat16: Rate | None = None
    float16: Rate | None = None
    fp8: Rate | None = None
    int8: Rate | None = None
    int4: Rate | None = None
    fp4: Rate | None = None


class Efficiency(Record):
    """What real kernels reach of the figures of a data sheet, and what they add; cost/calibrate.py fits it."""

    compute: Share = Field(0.6, description="Share of the peak rate that products of many tokens reach")
    exposed: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Share of a product's memory time that computing does not hide: rates rise with the tokens of a "
        "product, whatever the phase",
    )
    bandwidth: Share = Field(0.9, description="Share of the memory bandwidth that is reached")
    link: Share = Field(0.6, description="Share of the bandwidth of the link between devices that is reached")
    overhead_us: float = Field(8.0, ge=0, description="Fixed time per subblock and forward pass, microseconds")
    sequence_us: float = Field(
        0.2, ge=0, description="Time per sequence of an attention's decode step beside its cache, microseconds"
    )
    pass_us: float = Field(
        500.0, ge=0, description="Fixed time of a forward pass beside its kernels (scheduling, sampling), microseconds"
    )


class Fit(Record):
    """Factors fitted to measurements of one engine on this device, and their error on rows that were held out.

    Errors are relative, of generated tokens per second. Outside `tensor_parallel` and `contexts` nothing was compared.
    """

    engine: TargetEngine = Field(description="The engine that was measured")
    version: str = Field(description="Its version")
    efficiency: Efficiency
    measurements: str = Field(description="What was measured, and which rows were fitted")
    fitted_rows: Positive = Field(description="Rows that the factors were fitted to")
    held_out_rows: Positive = Field(description="Rows of the same measurements that they were compared with")
    mean_error: float = Field(ge=0, description="Mean of |predicted / measured - 1| over the held-out rows")
    largest_error: float = Field(ge=0, description="The largest of them")
    tensor_parallel: tuple[Positive, ...] = Field(description="Numbers of devices that were compared")
    contexts: tuple[Positive, Positive] = Field(description="Least and most tokens of a whole request")


Reservation = Literal["guaranteed", "optimistic"]


class Serving(Record):
    """What an engine does with the memory and how much it takes at a time."""

    memory_share: Share = Field(0.9, description="Share of a device's memory that the engine uses")
    reserved: Memory = Field("1GB", description="Of that, what weights and KV cache cannot have, per device")
    reservation: Reservation = Field(
        "guaranteed", description="Cache that a sequence holds: its whole context, or optimistically the mean over time"
    )
    max_sequences: Positive | None = Field(None, description="Most sequences at a time; unset: as many as fit")
    max_tokens: Positive = Field(8192, description="Most tokens of a forward pass; longer prefills take several")


class Interconnect(Record):
    """The link between the devices of a tensor-parallel group."""

    bandwidth: Bandwidth = Field(description="Per device and direction, for instance '450GB/s'")
    latency: Duration = Field(description="Of one all-reduce of nothing, for instance '10us'")


class HardwareSpec(Record):
    """The figures of a device's data sheet, and the precisions that it serves in."""

    device: str = Field(description="Name of the device")
    weights: Precision = Field("bfloat16", description="Precision of the weights")
    activations: Precision = Field("bfloat16", description="Precision of the activations")
    kv_cache: Precision = Field("bfloat16", description="Precision of the KV cache")
    memory: Memory = Field(description="Of one device as its driver says, for instance '81559MiB'")
    bandwidth: Bandwidth = Field(description="Of the device's memory, for instance '3.35TB/s'")
    peak_rates: PeakRates = Field(description="Dense, not sparse, for instance '989 TFLOP/s'")
    efficiency: Efficiency = Field(Efficiency(), description="Assumed factors, where none of `fits` is of the engine")
    fits: tuple[Fit, ...] = Field((), description="Factors fitted to measurements, by engine and version")
    serving: Serving = Serving()
    tensor_parallel: Positive = Field(1, description="Devices that share every layer")
    pipeline_parallel: Positive = Field(1, description="Groups of such devices that share the layers")
    interconnect: Interconnect | None = Field(None, description="Needed where several devices share a model")
    sources: dict[str, str] = Field({}, description="Where each figure comes from")

    @model_validator(mode="after")
    def _needed_figures_are_given(self) -> Self:
        for operation, products in (("weight", self.linear_products), ("attention", self.attention_products)):
            if getattr(self.peak_rates, products) is None:
                raise ValueError(
                    f"peak_rates.{products} is missing: {operation} products run in the wider of their operands' "
                    f"precisions (weights {self.weights}, activations {self.activations}, kv_cache {self.kv_cache})"
                )
        if self.devices > 1 and self.interconnect is None:
            raise ValueError(
                f"interconnect is missing: tensor_parallel is {self.tensor_parallel} and pipeline_parallel "
                f"{self.pipeline_parallel}, so give the link's bandwidth and latency"
            )
        return self

    @property
    def devices(self) -> int:
        """All devices that share one model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def usable_bytes(self) -> float:
        """Memory that weights and KV cache may take, of all devices together."""
        capacity, reserved = parse_memory(self.memory).value, parse_memory(self.serving.reserved).value
        return self.devices * (self.serving.memory_share * capacity - reserved)

    @property
    def linear_products(self) -> Products:
        """The rate of products of weights and activations: that of the wider of the two."""
        return LAYOUTS[_wider(self.weights, self.activations)].products

    @property
    def attention_products(self) -> Products:
        """The rate of products of queries with the KV cache: that of the wider of activations and cache."""
        return LAYOUTS[_wider(self.activations, self.kv_cache)].products


class TargetSpec(Record):
    """The hardware target that costs hold for."""

    name: Name = Field("this-machine", description="How reports call the target")
    costs: Literal["measured", "roofline", "imported"] = Field(
        "measured", description="Measured here, computed from the figures of `hardware`, or read from `table`"
    )
    engine: TargetEngine = Field(
        "torch",
        description=f"What serves: costs are measured in {' and '.join(engines_with(lambda row: row.costs_module))}, "
        "and imported for other engines",
    )
    gguf_type: GgufType | None = Field(
        None,
        description=f"For engine {' or '.join(engines_with(lambda row: row.gguf_types))}: type of the weights in the "
        "file; that of `dtype` if left out",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What to measure on; auto takes a GPU that is here"
    )
    dtype: Dtype | None = Field(
        None,
        description="Type of the child's checkpoint; of weights, activations and KV cache while measuring. Unset: "
        "bfloat16 for a parent in bfloat16, float32 for any other",
    )
    threads: Positive = Field(1, description="CPU threads while measuring")
    rounds: int = Field(7, ge=3, description="Interleaved rounds of a measurement; medians are kept")
    machine: Name | None = Field(
        None,
        description="For measured costs: your name of the machine, which keys hold instead of its fingerprint",
        exclude_if=lambda name: name is None,
    )
    hardware: HardwareSpec | None = Field(None, description="For roofline costs: the device's figures")
    table: str | None = Field(None, description="For imported costs: path of the cost table")

    engine_version: str | None = Field(
        None,
        description="For roofline costs: the version of the engine whose fit counts; unset: the last of `fits`",
        exclude_if=lambda version: version is None,
    )

    @property
    def fit(self) -> Fit | None:
        """The fit of this engine, if the hardware has one."""
        fits = [
            fit
            for fit in (self.hardware.fits if self.hardware else ())
            if fit.engine == self.engine and self.engine_version in (None, fit.version)
        ]
        return fits[-1] if fits else None

    @property
    def efficiency(self) -> Efficiency:
        """The factors that roofline costs are computed with: those of the fit, or assumed ones."""
        assert self.hardware, "only roofline costs have factors"
        return self.fit.efficiency if self.fit else self.hardware.efficiency

    @property
    def accuracy(self) -> str:
        """How far roofline costs are from measurements, as a sentence; nothing for other costs."""
        if self.hardware is None:
            return ""
        if (fit := self.fit) is None:
            return f"{self.engine} on {self.hardware.device}: not compared with measurements, factors are assumed"
        error = (
            f"{fit.engine} {fit.version} on {self.hardware.device}: throughput within {fit.mean_error:.1%} in the "
            f"mean and {fit.largest_error:.0%} at most of {fit.held_out_rows} held-out measurements"
        )
        if self.hardware.tensor_parallel not in fit.tensor_parallel or self.hardware.pipeline_parallel > 1:
            known = ", ".join(map(str, fit.tensor_parallel))
            error += f"; none is of {self.hardware.devices} devices like this (tensor_parallel {known})"
        return error

    def for_parent(self, dtype: Dtype) -> Self:
        """The same target with the parent's `dtype`, if it has none of its own."""
        return self if self.dtype else self.model_copy(update={"dtype": dtype})

    @property
    def served_dtype(self) -> Dtype:
        """`dtype`, which targets have in all works of a plan (`Plan.target`)."""
        assert self.dtype, "the target has no dtype: `for_parent` was not called"
        return self.dtype

    @model_validator(mode="after")
    def _costs_have_their_source(self) -> Self:
        for kind, key in (("roofline", "hardware"), ("imported", "table")):
            given = getattr(self, key) is not None
            if self.costs == kind and not given:
                raise ValueError(f"costs are {kind}, but {key} is missing: give it, or choose another kind of costs")
            if self.costs != kind and given:
                raise ValueError(f"{key} is given, but costs are {self.costs}: set `costs: {kind}`, or leave {key} out")
        return self

    @model_validator(mode="after")
    def _fit_exists(self) -> Self:
        if self.engine_version and not self.fit:
            known = ", ".join(f"{fit.engine} {fit.version}" for fit in self.hardware.fits) if self.hardware else ""
            raise ValueError(
                f"engine_version is {self.engine_version}, and there is no fit of {self.engine} {self.engine_version} "
                f"(fits: {known or 'none'}): leave it out, or fit one with `puzzle calibrate`"
            )
        return self

    @model_validator(mode="after")
    def _machine_is_measured(self) -> Self:
        if self.machine and self.costs != "measured":
            raise ValueError(f"machine is given, but costs are {self.costs}, which are measured on none: leave it out")
        return self

    @model_validator(mode="after")
    def _engine_supports_the_rest(self) -> Self:
        row = ENGINES[self.engine]
        if self.costs == "measured" and not row.costs_module:
            raise ValueError(f"engine is {self.engine}, which is not measured here: {row.not_measured}")
        if self.device not in ("auto", *row.devices):
            raise ValueError(
                f"engine is {self.engine}, which is measured on {', '.join(row.devices)} alone: leave device out, or "
                "set `engine: torch`"
            )
        if self.gguf_type and self.gguf_type not in row.gguf_types:
            takers = engines_with(lambda other: self.gguf_type in other.gguf_types)
            raise ValueError(
                f"gguf_type is given, but engine is {self.engine}: set `engine: {' or '.join(takers)}`, or leave it out"
            )
        return self


def load_target(path: Path) -> TargetSpec:
    """Read a target from its YAML file; the path of a cost table is relative to that file.

    Raises:
        SpecError: the file is missing or not YAML, or a key or value is wrong; names the key and the nearest known one.
    """
    content = read_keys(path, "target", "a target starts with `name:` (see deployments/targets/this-cpu.yaml)")
    if "table" in content:
        content["table"] = resolve_path(content["table"], path.resolve().parent)
    return parse_record(TargetSpec, content, str(path), "target")


def _wider(first: Precision, second: Precision) -> Precision:
    return first if LAYOUTS[first].bytes >= LAYOUTS[second].bytes else second
