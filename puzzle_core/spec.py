"""The run specification: all inputs of a run, as one frozen record from YAML or from a form in the UI.

The spec of each stage is part of the key of its artifacts. `runtime` (locations, number of workers) is part of no key,
so equal work has an equal key on every machine.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from puzzle_core.architecture import (
    EMPTY_BLOCK,
    BlockId,
    BlockVariant,
    ModelShape,
    Option,
    Variant,
    VariantId,
    in_window,
    variants_named,
)
from puzzle_core.credentials import SCHEMA_PATTERN, has_credentials
from puzzle_core.engines import ServingEngine, required_constraints, restrictions
from puzzle_core.errors import SpecError
from puzzle_core.quantities import (
    column_unit,
    parse_bytes,
    parse_column,
    parse_count,
    parse_memory,
    parse_parameters,
    parse_seconds,
    parse_share,
    parse_throughput,
)
from puzzle_core.records import Record
from puzzle_core.sizes import is_cheaper
from puzzle_core.target import ComputeDtype, Count, Name, Positive, Reservation, Share
from puzzle_core.target import Dtype as Dtype
from puzzle_core.target import TargetSpec as TargetSpec
from puzzle_core.text_sources import Texts
from puzzle_core.variants.kinds import KINDS, kinds_of
from puzzle_core.yaml_file import parse_record

Bytes = Annotated[str, BeforeValidator(parse_bytes.check), Field(json_schema_extra=parse_bytes.form)]
LayerCount = Annotated[str, BeforeValidator(parse_count.check), Field(json_schema_extra=parse_count.form)]
Parameters = Annotated[str, BeforeValidator(parse_parameters.check), Field(json_schema_extra=parse_parameters.form)]
Seconds = Annotated[str, BeforeValidator(parse_seconds.check), Field(json_schema_extra=parse_seconds.form)]
ShareOfParent = Annotated[str, BeforeValidator(parse_share.check), Field(json_schema_extra=parse_share.form)]
TaskName = Annotated[str, Field(pattern=r"^[\w.+-]+$")]
Throughput = Annotated[str, BeforeValidator(parse_throughput.check), Field(json_schema_extra=parse_throughput.form)]
WindowTokens = Annotated[int, Field(ge=8, le=10**9)]

GKD_SPLITS = ("gkd", "gkd-long")
"""The splits of the texts that the trainings of a child read, in their order."""
LONG_SCORING_SPLIT = "scoring-long"
"""The split of the second scores."""
PRODUCTS = "Type of activations and matrix products; auto: bfloat16 where this machine has fast products of it"
MOST = 1000
"""The most solutions, points of a frontier, rounds and combinations of batch sizes: each is a search of its own."""


class ParentSpec(Record):
    """The parent model."""

    path: str = Field(
        description="Directory or hub id of a Hugging Face causal LM of the Llama pattern, or a GGUF file, also one "
        "of an installed package (python-package:NAME/FILE)"
    )
    revision: str | None = Field(None, description="Hub revision; ignored for a directory")
    allow_remote_code: str | None = Field(
        None,
        description="Name of the one class that the checkpoint's own code may define, for instance "
        "'tokenization_x.XTokenizer'; nothing is imported from a checkpoint otherwise",
    )


class DataSpec(Record):
    """Sources and packing of tokens."""

    train_texts: tuple[str, ...] = Field(
        ("python-stdlib:train",), min_length=1, description="Text sources for calibration, BLD and GKD"
    )
    held_out_texts: tuple[str, ...] = Field(
        ("python-stdlib:held-out",), min_length=1, description="Text sources for scoring and evaluation"
    )
    held_out_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead of held_out_texts: share of the documents of train_texts that is held out",
        exclude_if=lambda share: share is None,
    )
    sequence_length: WindowTokens = Field(256, description="Tokens per window")
    seed: int = Field(0, description="Seed for the order of the documents, and of the windows in BLD and GKD")
    cut_documents: bool = Field(
        True,
        description="A split starts with the rest of the last document before it; false: splits share no document",
    )
    document_start: str = Field(
        "auto",
        description="Start of every document: auto (that of the tokenizer or its pretraining), none, or a token",
    )
    document_mask: bool = Field(
        False,
        description="Attention does not cross documents within a window, and positions start again at each",
        exclude_if=lambda masked: not masked,
    )

    @model_validator(mode="after")
    def _held_out_once(self) -> "DataSpec":
        if self.held_out_share and self.held_out_texts != type(self).model_fields["held_out_texts"].default:
            raise ValueError(
                "held_out_share takes held-out documents from train_texts: leave out held_out_share or held_out_texts"
            )
        return self

    @property
    def train(self) -> Texts:
        """The texts for calibration, BLD and GKD."""
        return Texts(sources=self.train_texts, held_out_share=self.held_out_share)

    @property
    def held_out(self) -> Texts:
        """The texts for scoring and evaluation."""
        if self.held_out_share:
            return Texts(sources=self.train_texts, held_out_share=self.held_out_share, held_out=True)
        return Texts(sources=self.held_out_texts)


class VariantRange(Record):
    """Other variants for a range of layers; a field that is not set has the value for all layers."""

    first_layer: int = Field(ge=0, description="Counted from 0")
    last_layer: int = Field(ge=0, description="Inclusive")
    kv_heads: tuple[Positive, ...] | None = Field(None, description="Replaces the value for all layers")
    windows: tuple[Positive, ...] | None = Field(
        None,
        description="Replaces the value for all layers",
        exclude_if=lambda windows: windows is None,
    )
    ffn_ratios: tuple[Share, ...] | None = Field(None, description="Replaces the value for all layers")
    ffn_widths: tuple[Positive, ...] | None = Field(None, description="Replaces the value for all layers")
    linear: bool | None = Field(None, description="Offer one linear layer in place of each subblock here")
    no_op: bool | None = Field(None, description="Offer to remove each subblock here")
    ids: tuple[VariantId, ...] | None = Field(
        None, description="Replaces the value for all layers", exclude_if=lambda ids: ids is None
    )

    @model_validator(mode="after")
    def _check_range(self) -> "VariantRange":
        if self.last_layer < self.first_layer:
            raise ValueError(f"last_layer ({self.last_layer}) comes before first_layer ({self.first_layer})")
        return self


class VariantsSpec(Record):
    """The search space: the variants of every layer. The parent's own variant is always among them."""

    kv_heads: tuple[Positive, ...] = Field((), description="KV heads of reduced attentions; divisors of the parent's")
    windows: tuple[Positive, ...] = Field(
        (),
        description="Sliding windows in tokens, for the parent's KV heads and for those of kv_heads",
        exclude_if=lambda windows: not windows,
    )
    ffn_ratios: tuple[Share, ...] = Field((), description="Widths of reduced FFNs as a share of the parent's")
    ffn_widths: tuple[Positive, ...] = Field((), description="Widths of reduced FFNs in channels")
    ffn_multiple_of: Positive = Field(1, description="Widths from ratios are rounded to a multiple of this")
    linear: bool = Field(True, description="Offer one linear layer in place of each subblock")
    no_op: bool = Field(True, description="Offer to remove each subblock")
    ids: tuple[VariantId, ...] = Field(
        (), description="Further variants of any kind, for instance attn:kv2", exclude_if=lambda ids: not ids
    )
    spans: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (),
        description="Offer every block of a layer also in the place of so many layers from there on; its halves are "
        "trained together",
        exclude_if=lambda spans: not spans,
    )
    span_blocks: tuple[BlockId, ...] = Field(
        (),
        description="The only blocks that are offered in the place of several layers; empty: all",
        exclude_if=lambda blocks: not blocks,
    )
    layers: tuple[VariantRange, ...] = Field(
        (), description="Exceptions for ranges of layers; a later one has precedence"
    )

    def of_layer(self, layer: int, shape: ModelShape) -> tuple[list[Variant], list[Variant]]:
        """Attention variants and FFN variants of one layer: the parent's own, and those that are cheaper.

        Raises:
            SpecError: the parent does not support a variant.
        """
        rules = {name: getattr(self, name) for name in type(self).model_fields}
        for exception in self.layers:
            if exception.first_layer <= layer <= exception.last_layer:
                changes = {name: value for name, value in exception if name in rules and value is not None}
                if {"ffn_ratios", "ffn_widths"} & changes.keys():
                    rules |= {"ffn_ratios": (), "ffn_widths": ()}
                rules |= changes
        rules["ffn_widths"] = self._widths(rules["ffn_ratios"], rules["ffn_widths"], shape.of_layer(layer))
        attentions, ffns = (
            [own, *sorted(_offered(rules, own, layer, shape), key=lambda variant: variant.rank)]
            for own in shape.parent_block(layer).subblocks
        )
        return attentions, ffns

    def blocks_of_layer(self, layer: int, shape: ModelShape) -> list[BlockVariant]:
        """All block variants of one layer, the parent's own first."""
        attentions, ffns = self.of_layer(layer, shape)
        return [BlockVariant(attention=a, ffn=f) for a in attentions for f in ffns]

    def spans_of_layer(self, layer: int, shape: ModelShape) -> list[Option]:
        """The options that replace several layers, of which this is the first."""
        blocks = [block for block in self.blocks_of_layer(layer, shape) if block != EMPTY_BLOCK]
        offered = [block for block in blocks if block in self.span_blocks or not self.span_blocks]
        return [
            Option(block, span) for span in sorted({*self.spans}) if layer + span <= shape.layers for block in offered
        ]

    def options_of_layer(self, layer: int, shape: ModelShape) -> list[Option]:
        """All block variants of one layer, the parent's own first, and those that replace also layers after it."""
        return [*map(Option, self.blocks_of_layer(layer, shape)), *self.spans_of_layer(layer, shape)]

    def in_widths(self, shape: ModelShape, multiple_of: int = 1) -> "VariantsSpec":
        """The same space with FFN widths in place of ratios, as far as they are a multiple of this."""

        def changes(part: "VariantsSpec | VariantRange") -> dict[str, Any]:
            if (part.ffn_ratios, part.ffn_widths) == (None, None):
                return {}
            widths = self._widths(part.ffn_ratios or (), part.ffn_widths or (), shape)
            return {"ffn_ratios": (), "ffn_widths": tuple(sorted(w for w in widths if not w % multiple_of))}

        layers = tuple(exception.model_copy(update=changes(exception)) for exception in self.layers)
        if shape.blocks:
            layers += tuple(self._in_widths_of(layer, shape, multiple_of) for layer in range(shape.layers))
        return self.model_copy(update=changes(self) | {"layers": layers})

    def _in_widths_of(self, layer: int, shape: ModelShape, multiple_of: int) -> VariantRange:
        """The FFN widths of one layer."""
        widths = {variant.ffn_width for variant in self.of_layer(layer, shape)[1]} - {0}
        kept = tuple(sorted(width for width in widths if not width % multiple_of))
        return VariantRange(first_layer=layer, last_layer=layer, ffn_widths=kept)

    def served_by(self, engines: tuple[ServingEngine, ...], shape: ModelShape) -> "VariantsSpec":
        """The same space without the variants that one of these engines supports in no layer.

        Ratios become widths where an engine has a grid for these, layer by layer where the parent's layers differ.
        """
        constraints = ConstraintsSpec().for_engines(engines)
        switches = {
            row.spec_field: False
            for row in KINDS.values()
            if row.spec_field and not row.sized and not row.restricted_by.isdisjoint(restrictions(engines))
        }

        def changed(part: "VariantsSpec | VariantRange") -> dict[str, Any]:
            changes: dict[str, Any] = {name: False for name in switches if getattr(part, name)}
            if part.windows and "no_windows" in restrictions(engines):
                changes["windows"] = ()
            if part.ids:
                changes["ids"] = tuple(variant for variant in part.ids if constraints.allows(variant, engines))
            return changes

        layers = tuple(exception.model_copy(update=changed(exception)) for exception in self.layers)
        served = self.model_copy(update=changed(self) | {"layers": layers})
        multiple = constraints.ffn_multiple_of
        return served.in_widths(shape, multiple) if multiple > 1 else served

    def _widths(self, ratios: tuple[float, ...], widths: tuple[int, ...], shape: ModelShape) -> set[int]:
        """FFN widths in channels, from ratios and from widths."""
        multiple = self.ffn_multiple_of
        return {max(round(r * shape.ffn_width / multiple) * multiple, multiple) for r in ratios} | set(widths)


def _offered(rules: Mapping[str, Any], own: Variant, layer: int, shape: ModelShape) -> set[Variant]:
    """The variants cheaper than the parent's own subblock of a layer that these fields of a `VariantsSpec` offer.

    A window that the layer's own is as short as makes no difference, so it is none of them. Where the layer's own is a
    variant within a window, others that attend stay in it.

    Raises:
        SpecError: the layer does not support a variant, or no layer is large enough for it.
    """
    subblock, of_layer, own_window = own.subblock, shape.of_layer(layer), shape.window(layer)
    offered = {variant for variant in rules["ids"] if variant.subblock == subblock}
    for row in kinds_of(subblock):
        value = rules[row.spec_field] if row.spec_field else ()
        if row.windowed:
            kv_heads = {own.kv_heads, *rules["kv_heads"]} - {0}
            offered |= {Variant(subblock, row.name, size, window) for size in kv_heads for window in value}
        else:
            sizes = value if row.sized else [0] if value else []
            offered |= {Variant(subblock, row.name, size) for size in sizes}
    if own.window:
        offered = {in_window(variant, own.window) for variant in offered}
    for variant in sorted(offered, key=lambda variant: variant.rank):
        fits_largest = variant.kv_heads <= shape.kv_heads and variant.ffn_width <= shape.ffn_width
        if not fits_largest or is_cheaper(of_layer, variant, own):
            of_layer.check(variant)
    return {v for v in offered if is_cheaper(of_layer, v, own) and not 0 < own_window <= v.window}


class ImportanceSpec(Record):
    """Channel contributions of the parent's FFNs (METHOD section 2)."""

    tokens: Positive = Field(65_536, description="Calibration tokens: the first of the training texts, as BLD's")


class OptimizerSpec(Record):
    """AdamW with warm-up, cosine decay to zero and gradient clipping."""

    learning_rate: float = Field(1e-3, gt=0, description="After the warm-up")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Warm-up steps as a share of all steps")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Coefficients of AdamW's two moving averages")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled, on matrices only")
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient")


Coupled = Literal["none", "linear_and_no_op", "shortlist", "all"]
"""Which blocks have halves that are trained together."""
BldSource = Literal["stored", "streamed"]
"""Where BLD gets the parent's states: from files, or from the parent as it trains."""


class BldSpec(Record):
    """Blockwise local distillation (METHOD section 3)."""

    tokens: Positive = Field(262_144, description="Training tokens per variant")
    sequence_length: WindowTokens | None = Field(
        None, description="Tokens per window; unset: data.sequence_length", exclude_if=lambda length: length is None
    )
    epochs: Positive = Field(1, description="Passes over these tokens")
    batch_tokens: Positive = Field(4096, description="Tokens per optimizer step; whole windows")
    micro_batch_tokens: Positive | None = Field(
        None,
        description="Tokens per forward pass; gradients add up to a batch. Unset: the whole batch",
        exclude_if=lambda tokens: tokens is None,
    )
    loss: Literal["tensor", "token"] = Field(
        "tensor",
        description="Squared error over the square of the parent's output: of the whole batch (tensor), or of every "
        "token, where a few tokens have huge activations (token)",
        exclude_if=lambda loss: loss == "tensor",
    )
    initial_weights: Literal["default", "best"] = Field(
        "default",
        description="Weights that a variant starts from: means of KV heads and channels of one pass (default), or of "
        "all ways that there are for its kind the one with the least loss before training (best)",
        exclude_if=lambda way: way == "default",
    )
    source: BldSource = Field(
        "stored",
        description="Where the parent's states come from: captured into files of runtime.scratch, layer by layer "
        "(stored), or computed by the parent while groups of layers train (streamed), which needs no disk and more "
        "computation. Weights are the same, and so are their keys",
        exclude_if=lambda source: source == "stored",
    )
    coupled: Coupled = Field(
        "none",
        description="Blocks whose halves are trained once more, together: those with a linear layer or a no-op, those "
        "that a first search picks (shortlist: at most 4 attentions and 3 FFNs of a layer, which a second search "
        "chooses from), or all",
        exclude_if=lambda coupled: coupled == "none",
    )
    dtype: ComputeDtype = Field("float32", description=f"{PRODUCTS}; weights stay float32")
    optimizer: OptimizerSpec = OptimizerSpec()


ScoringMethod = Literal["exact", "fisher"]
"""How one score is made: by the layers after the block, or from gradients of the parent."""


class LongScoringSpec(Record):
    """A second score of every block, on longer windows."""

    tokens: Positive = Field(16_384, description="Held-out tokens per score, after those of the evaluation")
    sequence_length: WindowTokens = Field(description="Tokens per window: more than those of the first scores")
    weight: float = Field(1.0, gt=0, description="The score of a block is the first one plus this times the long one")


class ScoringSpec(Record):
    """Replace-1-block scores (METHOD section 4)."""

    tokens: Positive = Field(16_384, description="Held-out tokens per score")
    sequence_length: WindowTokens | None = Field(
        None, description="Tokens per window; unset: data.sequence_length", exclude_if=lambda length: length is None
    )
    composition: Literal["pairs", "subblocks"] = Field(
        "pairs", description="Score every block variant (pairs), or single subblocks and add their scores (subblocks)"
    )
    dtype: ComputeDtype = Field("float32", description=PRODUCTS)
    method: Literal["exact", "fisher", "lazy"] = Field(
        "exact",
        description="Run the layers after the block (exact), estimate the KL from gradients of the parent (fisher), or "
        "estimate all and have each search score exactly what its answer uses (lazy)",
        exclude_if=lambda method: method == "exact",
    )
    label_samples: Positive = Field(
        8,
        description="Backward passes of an estimate, each on labels drawn from the parent's predictions",
        exclude_if=lambda samples: samples == 8,
    )

    long: LongScoringSpec | None = Field(
        None,
        description="A second score on longer windows, which tells what a variant loses of a long context",
        exclude_if=lambda long: long is None,
    )


class LimitsSpec(Record):
    """Limits that the child must meet. A value is absolute with a unit (`80GiB`, `300ms`, `6000 tok/s`), or a share of
    the parent's value at the same batch size (`60%`)."""

    memory: Bytes | None = Field(None, description="At most: parameters plus KV cache at the full context of the batch")
    parameters: Parameters | None = Field(None, description="At most: number of parameters")
    active_parameters: Parameters | None = Field(None, description="At most: number of parameters that one token uses")
    kv_bytes_per_token: Bytes | None = Field(None, description="At most: KV cache per token")
    throughput: Throughput | None = Field(None, description="At least: tokens per second of prefill plus decode time")
    time_to_first_token: Seconds | None = Field(None, description="At most: prefill of the batch")
    time_per_output_token: Seconds | None = Field(None, description="At most: one decode step, on average")
    latency: Seconds | None = Field(None, description="At most: prefill plus the whole generation")
    block_time: ShareOfParent | None = Field(
        None, description="At most: prefill plus decode time in blocks, without the rest of the model"
    )
    block_prefill_time: ShareOfParent | None = Field(
        None, description="At most: prefill time in blocks, without the rest of the model"
    )
    block_decode_time: ShareOfParent | None = Field(
        None, description="At most: decode time in blocks, without the rest of the model"
    )
    attention_layers: LayerCount | None = Field(None, description="At most: layers whose attention has KV heads")
    kv_heads: LayerCount | None = Field(None, description="At most: KV heads of all layers together")
    counts: dict[str, LayerCount] = Field(
        {},
        description="At most: layers with a variant, or with any of a kind, by its id: attn:kv4, attn:kv, ffn:no_op",
    )
    columns: dict[str, str] = Field({}, description="At most: any other column of the cost table, for instance energy")

    def by_name(self) -> dict[str, str]:
        """Every limit that is set, by name; other limits by the name of their column, variant or kind."""
        named = self.model_dump(exclude={"columns", "counts"}, exclude_none=True)
        return named | self.counts | self.columns

    @model_validator(mode="before")
    @classmethod
    def _move_columns(cls, content: Any) -> Any:
        """Move a limit on a column that stands beside the others under `columns`: its name ends in a unit."""
        if not isinstance(content, dict) or not isinstance(content.get("columns") or {}, dict):
            return content
        moved = {key for key in content if isinstance(key, str) and key not in cls.model_fields and column_unit(key)}
        columns = dict(content.get("columns") or {})
        if repeated := sorted(moved & columns.keys()):
            raise ValueError(f"{', '.join(repeated)}: given here and under `columns`")
        rest = {key: value for key, value in content.items() if key not in moved}
        return rest | ({"columns": columns | {key: content[key] for key in content if key in moved}} if moved else {})

    @model_validator(mode="after")
    def _check_counts(self) -> "LimitsSpec":
        counts = {name: text for name in ("attention_layers", "kv_heads") if (text := getattr(self, name))}
        for name in self.counts:
            variants_named(name)
        for name, text in (counts | self.counts).items():
            number = parse_count(text)
            if not number.relative and not number.value.is_integer():
                raise ValueError(f"{name}: {text!r} is no whole number")
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> "LimitsSpec":
        for column, text in self.columns.items():
            if column in type(self).model_fields or column in self.counts:
                raise ValueError(f"columns.{column}: set the limit {column!r} outside `columns`")
            parse_column(column, text)
        return self


class ScenarioSpec(Record):
    """Traffic of requests, and the limits at this traffic."""

    name: Name = Field("chatbot", description="Name of this traffic in reports")
    prompt_tokens: Count = Field(128, description="Prompt tokens per request")
    generated_tokens: Count = Field(128, description="Generated tokens per request")
    batch_sizes: tuple[Count, ...] = Field(
        (1,), min_length=1, description="The search tries each batch size and keeps the best"
    )
    batching: Literal["static", "continuous"] = Field(
        "static",
        description="static: the batch is prefilled, then decodes. continuous: sequences come and go, so prefills of "
        "others lie between the tokens of each, and a first token waits for one prompt, not for the batch",
        exclude_if=lambda batching: batching == "static",
    )
    throughput_counts: Literal["generated", "total"] = Field(
        "generated", description="Tokens that `throughput` counts: generated tokens, or prompt and generated tokens"
    )
    weight: float = Field(1.0, ge=1e-6, le=1e6, description="Relative number of these requests in a mix of scenarios")
    limits: LimitsSpec = LimitsSpec()

    @property
    def counted_tokens(self) -> int:
        """Tokens of one request that its throughput counts."""
        return self.generated_tokens + (self.prompt_tokens if self.throughput_counts == "total" else 0)


class MixSpec(Record):
    """Limits on the weighted mix of all scenarios, each at the batch size that the search selects."""

    throughput: Throughput | None = Field(
        None, description="At least: tokens per second of device time over all requests"
    )
    latency: Seconds | None = Field(None, description="At most: weighted mean of prefill plus the whole generation")

    def by_name(self) -> dict[str, str]:
        """Every limit that is set, by name."""
        return self.model_dump(exclude_none=True)


class KeepSpec(Record):
    """Layers that keep the parent's own subblock; -1 is the last layer."""

    attention: tuple[int, ...] = Field((), description="Layers that keep the parent's attention")
    ffn: tuple[int, ...] = Field((), description="Layers that keep the parent's FFN")


class ConstraintsSpec(Record):
    """Constraints on the architecture that do not depend on scores or costs."""

    keep: KeepSpec = KeepSpec()
    linear: bool = Field(True, description="Allow linear layers in place of subblocks")
    no_op: bool = Field(True, description="Allow subblocks to be removed")
    max_ffn_widths: Count | None = Field(None, description="Maximum number of different FFN widths")
    uniform_kv_heads: bool = Field(False, description="All remaining attentions have the same number of KV heads")
    ffn_multiple_of: Count = Field(1, description="FFN widths must be a multiple of this")
    attention_first: bool = Field(False, description="Layer 0 keeps an attention with any number of KV heads")
    tensor_parallel: Count = Field(
        1,
        description="Devices that share every layer. FFN widths are multiples of it, KV heads multiples or divisors",
    )

    def for_engines(self, engines: tuple[ServingEngine, ...]) -> "ConstraintsSpec":
        """These constraints and those that the engines require (puzzle_core/engines.py)."""
        required = required_constraints(engines)
        multiple = math.lcm(self.ffn_multiple_of, required.get("ffn_multiple_of", 1))
        return self.model_copy(update=required | {"ffn_multiple_of": multiple})

    def on_devices(self, target: TargetSpec) -> "ConstraintsSpec":
        """These constraints and what the devices of the target can share.

        Raises:
            SpecError: `tensor_parallel` is set here too, to another number.
        """
        devices = target.hardware.tensor_parallel if target.hardware else self.tensor_parallel
        if self.tensor_parallel not in (1, devices):
            raise SpecError(
                f"constraints.tensor_parallel is {self.tensor_parallel} and target.hardware.tensor_parallel {devices}: "
                "set the target's alone"
            )
        return self.model_copy(update={"tensor_parallel": devices})

    def allows(self, variant: Variant, engines: tuple[ServingEngine, ...]) -> bool:
        """Whether these constraints and these engines allow a variant in any layer."""
        row = variant.row
        if row.restricted_by and not row.restricted_by.isdisjoint(restrictions(engines)):
            return False
        if row.constraint_field and not getattr(self, row.constraint_field):
            return False
        return row.fits_devices(variant.size, self.tensor_parallel) and variant.ffn_width % self.ffn_multiple_of == 0


Baseline = Literal[
    "mip_no_op_only", "mip_lm_loss", "greedy", "uniform", "random", "maximise_parameters", "depth", "depth_run"
]
DEPTH = {"depth", "depth_run"}
"""The baselines that drop whole layers: those of least influence, or those of the run of least influence."""


class SearchSpec(Record):
    """The mixed-integer program (METHOD section 6)."""

    objective: Literal["kl", "lm_loss", "disagreement"] = Field("kl", description="The score to minimise")
    solutions: int = Field(1, ge=1, le=MOST, description="Number of diverse solutions; the best is assembled")
    alpha: float = Field(0.8, gt=0, lt=1, description="Largest share of layers that two solutions have in common")
    node_limit: int = Field(
        20_000,
        ge=1,
        le=10**9,
        description="Nodes of branch and bound per solve; at the limit, the best so far is the answer",
    )
    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="Seconds per solve. An answer cut by it depends on the machine: the store does not take it",
    )
    frontier_points: int = Field(12, ge=2, le=MOST, description="Points of score against block time in the report")
    frontier_limit: str | None = Field(
        None,
        description="Limit of the main scenario that the frontier varies instead of block time, over all batch sizes",
    )
    shortlist: int = Field(
        1,
        ge=1,
        le=MOST,
        description="Number of diverse solutions to assemble; the one with the lowest measured KL is the child",
    )
    iterations: int = Field(
        0,
        ge=0,
        le=MOST,
        description="Further rounds: each scores every block in the child instead of the parent and searches again",
    )
    explain: bool = Field(
        True, description="Report the gain from looser limits and the runner-up of each layer, exact or as intervals"
    )
    baselines: tuple[Baseline, ...] = Field(
        ("mip_no_op_only", "mip_lm_loss", "greedy", "uniform", "random", "maximise_parameters"),
        description="Baseline search methods; their children are assembled and evaluated too. Beside the default ones, "
        "depth and depth_run drop whole layers by their influence, the least ones or a run of them",
    )


class ServedOn(Record):
    """What the target's devices and engine hold, whatever limits a scenario has; for roofline costs alone."""

    devices: str = Field(description="Number and name of the devices")
    memory: Bytes = Field(description="For weights and KV cache, all devices together")
    reservation: Reservation = Field("guaranteed", description="Cache that a sequence holds")
    max_sequences: Positive | None = Field(None, description="Most sequences at a time")
    accuracy: str = Field("", description="How far the costs are from measurements of this engine on this device")

    @classmethod
    def of(cls, target: TargetSpec) -> "ServedOn | None":
        """Of a target; none where its costs are not computed from figures."""
        if (hardware := target.hardware) is None:
            return None
        return cls(
            devices=f"{hardware.devices} x {hardware.device}",
            memory=f"{max(0.1, math.floor(hardware.usable_bytes / 2**30 * 10) / 10)}GiB",
            reservation=hardware.serving.reservation,
            max_sequences=hardware.serving.max_sequences,
            accuracy=target.accuracy,
        )


class SearchRequest(Record):
    """The input of a search: traffic and limits, constraints on the architecture, and settings of the search."""

    scenario: ScenarioSpec
    more_scenarios: tuple[ScenarioSpec, ...] = Field((), description="Other traffic that the same child must serve")
    mix: MixSpec | None = None
    constraints: ConstraintsSpec = ConstraintsSpec()
    engines: tuple[ServingEngine, ...] = Field(
        (),
        description="Serving engines that must all run the child; variants that one does not support are excluded",
    )
    search: SearchSpec = SearchSpec()
    served_on: ServedOn | None = Field(
        None, description="What the devices hold", exclude_if=lambda served_on: served_on is None
    )

    @property
    def scenarios(self) -> tuple[ScenarioSpec, ...]:
        """All scenarios, the main one first."""
        return (self.scenario, *self.more_scenarios)

    def at(self, batch_sizes: Mapping[str, int]) -> "SearchRequest":
        """The same request with a fixed batch size for every scenario."""
        main, *more = (s.model_copy(update={"batch_sizes": (batch_sizes[s.name],)}) for s in self.scenarios)
        return self.model_copy(update={"scenario": main, "more_scenarios": tuple(more)})

    @model_validator(mode="after")
    def _check_limits(self) -> "SearchRequest":
        names = [scenario.name for scenario in self.scenarios]
        if len(set(names)) < len(names):
            raise ValueError(f"scenarios {', '.join(names)}: give every scenario a different name")
        combinations = math.prod(len(set(scenario.batch_sizes)) for scenario in self.scenarios)
        if combinations > MOST:
            raise ValueError(
                f"the batch sizes of {len(names)} scenarios have {combinations:,} combinations, and the search tries "
                f"every one: leave at most {MOST:,}"
            )
        limits = [scenario.limits.by_name() for scenario in self.scenarios]
        if not any(limits) and not (self.mix and self.mix.by_name()):
            known = ", ".join(name for name in LimitsSpec.model_fields)
            raise ValueError(f"no limit given: set at least one of {known} under scenario.limits")
        return self


class LongGkdSpec(Record):
    """A second GKD, of the child that the first one gave, on longer windows. What is not set is as in the first one."""

    sequence_length: WindowTokens = Field(description="Tokens per window")
    tokens: Positive = Field(description="Training tokens, of texts that follow those of the first GKD")
    epochs: Positive = Field(1, description="Passes over these tokens")
    batch_tokens: Positive | None = Field(None, description="Tokens per optimizer step; whole windows")
    micro_batch_tokens: Positive | None = Field(None, description="Tokens per forward pass; whole windows")
    learning_rate: float | None = Field(None, gt=0, description="After the warm-up")


class RoundGkdSpec(Record):
    """The GKD of an earlier round of iterated Puzzle. What is not set is as in the last round."""

    tokens: Positive = Field(description="Training tokens")
    epochs: Positive | None = Field(None, description="Passes over these tokens")
    batch_tokens: Positive | None = Field(None, description="Tokens per optimizer step; whole windows")
    learning_rate: float | None = Field(None, gt=0, description="After the warm-up")


class RoundSpec(Record):
    """A round of iterated Puzzle before the last one, whose child is the next round's parent (METHOD section 10)."""

    limits: LimitsSpec = Field(
        description="Milder limits of the main scenario; shares are of the first parent's value. Limits of other "
        "scenarios and of the mix hold in the last round alone"
    )
    gkd: RoundGkdSpec

    @model_validator(mode="after")
    def _check_limits(self) -> "RoundSpec":
        if not self.limits.by_name():
            raise ValueError("no limit given: a round searches at a limit that is milder than the next round's")
        return self


class ChildSpec(Record):
    """How a child is put together (METHOD section 7)."""

    fuse_ffn: bool = Field(
        False,
        description="FFNs with no attention between them become one wide FFN before GKD: fewer and larger products, "
        "but an approximation, since all of them then read the input of the first",
    )


class GkdSpec(Record):
    """Global knowledge distillation (METHOD section 7)."""

    tokens: Positive = Field(524_288, description="Training tokens")
    sequence_length: WindowTokens | None = Field(
        None, description="Tokens per window; unset: data.sequence_length", exclude_if=lambda length: length is None
    )
    epochs: Positive = Field(1, description="Passes over these tokens")
    batch_tokens: Positive = Field(4096, description="Tokens per optimizer step; whole windows")
    micro_batch_tokens: Positive | None = Field(
        None, description="Tokens per forward pass; gradients add up to a batch"
    )
    cosine_weight: float = Field(1.0, ge=0, description="Weight of the sum over layers of 1 - cos(h_child, h_parent)")
    kl_weight: float = Field(1.0, ge=0, description="Weight of KL(parent || child) on logits")
    lm_weight: float = Field(0.0, ge=0, description="Weight of the next-token loss on the texts")
    held_back_checks: int = Field(
        8,
        ge=0,
        le=MOST,
        description="Times that KL is measured on held-back windows during the training; the weights with the least KL "
        "are kept. 0: no window is held back, and the last weights are kept",
    )
    patience: Positive | None = Field(
        None, description="Checks in a row without a lower KL after which the training stops early; unset: never"
    )
    dtype: ComputeDtype = Field("float32", description=f"{PRODUCTS}; weights stay float32")
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=5e-4)
    long: LongGkdSpec | None = Field(
        None, description="A second training on longer windows", exclude_if=lambda long: long is None
    )

    @property
    def trainings(self) -> tuple["GkdSpec", ...]:
        """The trainings in their order, each with its settings whole."""
        first = self.model_copy(update={"long": None})
        return (first,) if self.long is None else (first, first.changed(self.long))

    def changed(self, changes: "LongGkdSpec | RoundGkdSpec") -> "GkdSpec":
        """This training with the settings that `changes` has."""
        values = {name: value for name, value in changes if value is not None}
        if rate := values.pop("learning_rate", None):
            values["optimizer"] = self.optimizer.model_copy(update={"learning_rate": rate})
        return self.model_copy(update=values)

    @model_validator(mode="after")
    def _check_weights(self) -> "GkdSpec":
        if not self.cosine_weight + self.kl_weight + self.lm_weight:
            raise ValueError("all weights are 0, so there is no loss: set cosine_weight or kl_weight above 0")
        return self

    @model_validator(mode="after")
    def _check_patience(self) -> "GkdSpec":
        if self.patience and not self.held_back_checks:
            raise ValueError(
                f"patience is {self.patience} and held_back_checks is 0, so nothing is measured that could stop the "
                "training: set held_back_checks above 0, or leave out patience"
            )
        return self


class MultipleChoiceSpec(Record):
    """A multiple-choice benchmark in a file of JSON Lines (docs/formats.md)."""

    name: TaskName = Field(description="Name of the benchmark in reports")
    file: str = Field(description="JSON Lines, plain or compressed: query, choices, label on every line")
    limit: Positive | None = Field(None, description="Number of items, from the start of the file; unset: all")


class HarnessSpec(Record):
    """Options of lm-evaluation-harness for `lm_eval_tasks`."""

    few_shot: int | None = Field(None, ge=0, description="Examples before each question; unset: as the task says")
    limit: Positive | None = Field(None, description="Number of items of each task; unset: all")
    batch_size: Positive = Field(8, description="Sequences per forward pass")
    chat_template: bool = Field(False, description="Ask in the form of the tokenizer's chat template")
    task_folder: str | None = Field(None, description="Directory with the YAML files of further tasks")


class EvaluationSpec(Record):
    """Evaluation of parent and child on held-out text and on benchmarks."""

    tokens: Positive = Field(65_536, description="Held-out tokens")
    sequence_length: WindowTokens | None = Field(
        None, description="Tokens per window; unset: data.sequence_length", exclude_if=lambda length: length is None
    )
    dtype: ComputeDtype = Field(
        "float32",
        description=f"{PRODUCTS}. Parent and child are stored in it while they are evaluated",
        exclude_if=lambda dtype: dtype == "float32",
    )
    tasks: tuple[MultipleChoiceSpec, ...] = Field(
        (), description="Multiple-choice benchmarks in files", exclude_if=lambda tasks: not tasks
    )
    lm_eval_tasks: tuple[TaskName, ...] = Field((), description="Tasks of lm-evaluation-harness, if it is installed")
    lm_eval: HarnessSpec = Field(
        HarnessSpec(),
        description="Options of lm-evaluation-harness",
        exclude_if=lambda options: options == HarnessSpec(),
    )
    timing_rounds: int = Field(7, ge=3, description="Rounds of end-to-end timings, alternating parent and child")

    @model_validator(mode="after")
    def _check_names(self) -> "EvaluationSpec":
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks {', '.join(names)}: give every benchmark a different name")
        return self


class BudgetSpec(Record):
    """What one run may compute; what the store has already costs nothing."""

    hours: float = Field(
        gt=0, le=1e9, description="Hours of GPUs in all, or of CPU cores where no GPU computes; then the run stops"
    )
    price_per_hour: float | None = Field(None, ge=0, description="Price of such an hour, for what a run came to")


class RuntimeSpec(Record):
    """Locations, services and parallelism. This part is in no key."""

    store: str = Field(
        ".puzzle/store",
        description="Artifact store: a directory or s3://bucket/prefix",
        json_schema_extra={"pattern": SCHEMA_PATTERN + r"(?![^:/]+://.*[@?])"},
    )
    on_corruption: Literal["refuse", "recompute"] = Field(
        "refuse", description="Action for an artifact with damaged files: stop, or compute it again"
    )
    scratch: str = Field(".puzzle/scratch", description="Local directory for activations and training checkpoints")
    cache_size: Annotated[str, BeforeValidator(parse_memory.check), Field(json_schema_extra=parse_memory.form)] = Field(
        "20GiB", description="Maximum size of local copies of a bucket's artifacts under scratch, for instance 20GiB"
    )
    mlflow_uri: str = Field(
        "sqlite:///.puzzle/mlflow.db",
        description="MLflow tracking URI; at its default, MLFLOW_TRACKING_URI of the environment counts, then the "
        "server that `make up` runs here",
    )
    mlflow_experiment: str = Field("puzzle", description="Name of the MLflow experiment")
    tracking: Literal["best_effort", "required"] = Field(
        "best_effort",
        description="What a record that MLflow does not take means: the run goes on and says so, or it fails",
        exclude_if=lambda tracking: tracking == "best_effort",
    )
    budget: BudgetSpec | None = Field(
        None,
        description="Stop before the run has computed for longer; finished work and checkpoints stay",
        exclude_if=lambda budget: budget is None,
    )
    workers: Positive | None = Field(None, description="Number of parallel tasks; default one per core or GPU")
    bld_side_by_side: Positive | None = Field(
        None,
        description="Trainings of BLD under way at a time; unset: all variants of a layer, which then read its states "
        "once. Fewer need less memory: a training keeps 16 bytes per parameter of its variant on its device",
        exclude_if=lambda trainings: trainings is None,
    )
    task_runner: Literal["threads", "dask"] = Field(
        "threads", description="Task runner of BLD, scores and evaluations: threads of the run, or processes under Dask"
    )
    dask_address: str | None = Field(
        None,
        pattern=r"^(tcp|tls)://[^/?#\s]+:[0-9]+$",
        json_schema_extra={"pattern": r"^(tcp|tls)://[^@/?#\s]+:[0-9]+$"},
        description="Scheduler of a running Dask cluster, for instance tcp://10.0.0.5:8786; unset: local processes",
    )
    gkd_recompute: bool = Field(
        False,
        description="GKD computes the activations of blocks again in the backward pass: less memory, a quarter more "
        "operations, the same result; several processes always do",
        exclude_if=lambda recompute: not recompute,
    )
    gkd_processes: Positive = Field(
        1,
        description="Processes per machine for GKD, one per GPU. Several processes shard parent "
        "and child (FSDP2), for parents that do not fit on one device",
    )
    gkd_machines: Positive = Field(
        1, description="Number of machines for GKD; the run's log has the command for the others"
    )
    gkd_rendezvous: str | None = Field(
        None,
        pattern=r"^[^@/:?#\s]+:[0-9]+$",
        description="Rendezvous of the machines: this machine's name and a free port, for instance node-0:29500",
    )
    task_timeout_s: float | None = Field(
        None,
        gt=0,
        description="Time limit of a task in seconds. A task over it fails; the next run resumes from its checkpoint",
    )
    checkpoint_seconds: float = Field(60.0, ge=0, description="Minimum seconds between two checkpoints of a training")

    @model_validator(mode="after")
    def _budget_is_kept_by_one_process(self) -> Self:
        if self.budget and self.task_runner == "dask":
            raise ValueError("budget is given, but task_runner is dask, whose workers keep no account: use threads")
        return self

    @model_validator(mode="after")
    def _refuse_credentials(self) -> "RuntimeSpec":
        """Refuse credentials, because a spec is logged and shown. The error does not repeat them."""
        if "://" in self.store and ("@" in self.store or "?" in self.store):
            raise ValueError("store holds credentials or options: give s3://bucket/prefix and set AWS_PROFILE")
        if has_credentials(self.mlflow_uri):
            raise ValueError(
                "mlflow_uri holds credentials: give http://host:port and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        if "@" in (self.dask_address or ""):
            raise ValueError("dask_address holds credentials: give tcp://host:port, or configure Dask's TLS for tls://")
        return self

    @model_validator(mode="after")
    def _check_dask_address(self) -> "RuntimeSpec":
        if self.dask_address and self.task_runner != "dask":
            raise ValueError("dask_address is set, but task_runner is 'threads': set task_runner to 'dask'")
        return self

    @model_validator(mode="after")
    def _check_rendezvous(self) -> "RuntimeSpec":
        if self.gkd_machines > 1 and not self.gkd_rendezvous:
            raise ValueError("gkd_machines is above 1: set gkd_rendezvous to this machine's name and a free port")
        return self


class SplitSize(NamedTuple):
    """How many tokens a split needs, and tokens per window."""

    tokens: int
    sequence_length: int


COMPUTING_PARTS = ("bld", "scoring", "gkd", "evaluation")
"""The parts with a type of matrix products."""


class ChampionSpec(Record):
    """The gate that makes a child the champion of its target and scenario in MLflow."""

    kept_accuracy: float = Field(
        gt=0, le=2, description="Least share of the parent's accuracy that the child keeps, for instance 0.97"
    )
    measured_limits: bool = Field(True, description="The limits must also hold as measured")


class RunSpec(Record):
    """All settings of a run: parent, data, stages, hardware target, traffic, search and runtime."""

    name: Name = Field("puzzle", description="Name of runs and reports")
    parent: ParentSpec
    data: DataSpec = DataSpec()
    variants: VariantsSpec = VariantsSpec()
    importance: ImportanceSpec = ImportanceSpec()
    bld: BldSpec = BldSpec()
    scoring: ScoringSpec = ScoringSpec()
    target: TargetSpec = TargetSpec()
    scenario: ScenarioSpec
    more_scenarios: tuple[ScenarioSpec, ...] = Field((), description="Other traffic that the same child must serve")
    mix: MixSpec | None = Field(None, description="Limits on the weighted mix of all scenarios")
    constraints: ConstraintsSpec = ConstraintsSpec()
    engines: tuple[ServingEngine, ...] = Field(
        (),
        description="Serving engines that must all run the child; variants that one does not support are excluded",
    )
    search: SearchSpec = SearchSpec()
    child: ChildSpec = Field(
        ChildSpec(), description="How a child is put together", exclude_if=lambda child: child == ChildSpec()
    )
    gkd: GkdSpec = GkdSpec()
    rounds: tuple[RoundSpec, ...] = Field(
        (),
        max_length=MOST,
        description="Iterated Puzzle: earlier rounds, each at limits of its own. The child of a round is the next "
        "one's parent; the last round is at the limits of the scenario",
        exclude_if=lambda rounds: not rounds,
    )
    evaluation: EvaluationSpec = EvaluationSpec()
    champion: ChampionSpec | None = Field(
        None,
        description="Gate of the champion; unset: `puzzle promote` makes champions",
        exclude_if=lambda gate: gate is None,
    )
    runtime: RuntimeSpec = RuntimeSpec()

    @property
    def request(self) -> SearchRequest:
        """The input of the search."""
        fields = {name: getattr(self, name) for name in SearchRequest.model_fields if name != "served_on"}
        fields["constraints"] = self.constraints.on_devices(self.target)
        return SearchRequest(**fields, served_on=ServedOn.of(self.target))

    @property
    def scenarios(self) -> tuple[ScenarioSpec, ...]:
        """All scenarios, the main one first."""
        return self.request.scenarios

    @property
    def splits(self) -> dict[str, SplitSize]:
        """The splits of the texts by name; those of a training or of held-out texts in the order of their packing."""
        gkd = zip(GKD_SPLITS, self.gkd.trainings, strict=False)
        stages: dict[str, Any] = {"calibration": self.importance, "bld": self.bld, **dict(gkd)}
        stages |= {"scoring": self.scoring, "evaluation": self.evaluation}
        stages |= {LONG_SCORING_SPLIT: self.scoring.long} if self.scoring.long else {}
        lengths = {name: getattr(stage, "sequence_length", None) for name, stage in stages.items()}
        return {
            name: SplitSize(stage.tokens, lengths[name] or self.data.sequence_length) for name, stage in stages.items()
        }

    @property
    def sequence_lengths(self) -> dict[str, int]:
        """Tokens per window, by the fields that set them."""
        parts: dict[str, Any] = {"data": self.data, "bld": self.bld, "gkd": self.gkd, "gkd.long": self.gkd.long}
        parts |= {"scoring": self.scoring, "scoring.long": self.scoring.long, "evaluation": self.evaluation}
        lengths = {f"{name}.sequence_length": getattr(part, "sequence_length", None) for name, part in parts.items()}
        return {field: length for field, length in lengths.items() if length}

    def with_dtype(self, auto: Dtype) -> "RunSpec":
        """The same specification with this type in place of every `auto`."""
        parts = {name: getattr(self, name) for name in COMPUTING_PARTS}
        return self.model_copy(
            update={
                name: part.model_copy(update={"dtype": auto}) for name, part in parts.items() if part.dtype == "auto"
            }
        )

    def of_round(self, number: int) -> "RunSpec":
        """The settings of a round, counted from 0; those of the last round are the specification's own.

        An earlier round has no baselines and no second distillation: its child is a step on the way.
        """
        if number >= len(self.rounds):
            return self
        changes = self.rounds[number]
        without = tuple(scenario.model_copy(update={"limits": LimitsSpec()}) for scenario in self.more_scenarios)
        return self.model_copy(
            update={
                "scenario": self.scenario.model_copy(update={"limits": changes.limits}),
                "more_scenarios": without,
                "mix": None,
                "search": self.search.model_copy(update={"baselines": ()}),
                "gkd": self.gkd.trainings[0].changed(changes.gkd),
            }
        )

    @property
    def auto_parts(self) -> tuple[str, ...]:
        """The parts whose type of products the machine decides."""
        return tuple(name for name in COMPUTING_PARTS if getattr(self, name).dtype == "auto")

    def served_variants(self, shape: ModelShape) -> VariantsSpec:
        """The search space without the variants that one of `engines` supports in no layer."""
        return self.variants.served_by(self.engines, shape)

    @model_validator(mode="after")
    def _check_request(self) -> "RunSpec":
        try:
            _ = self.request
        except SpecError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _refuse_credentials(self) -> "RunSpec":
        """Refuse credentials in every field. The error does not repeat them."""
        for key, text in _texts(self.model_dump(mode="json")):
            if has_credentials(text):
                raise ValueError(f"{key} is an address with credentials: a specification is recorded and shown")
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> "RunSpec":
        if self.scoring.method != "exact" and self.search.objective != "kl":
            raise ValueError(
                f"search.objective is {self.search.objective}, and scoring.method: {self.scoring.method} estimates the "
                "KL alone: set search.objective to kl, or scoring.method to exact"
            )
        return self

    @model_validator(mode="after")
    def _check_long_scores(self) -> "RunSpec":
        if (long := self.scoring.long) is None:
            return self
        first = self.splits["scoring"].sequence_length
        if long.sequence_length <= first:
            raise ValueError(
                f"scoring.long.sequence_length is {long.sequence_length}, and the first scores read windows of {first} "
                "tokens: set a larger one, or leave out scoring.long"
            )
        if self.scoring.method != "exact":
            raise ValueError(f"scoring.long is exact, and scoring.method is {self.scoring.method}: set it to exact")
        if self.search.shortlist > 1 or self.search.iterations:
            raise ValueError(
                "search.shortlist and search.iterations measure children on the windows of the first scores alone: "
                "leave them out, or scoring.long"
            )
        return self

    @model_validator(mode="after")
    def _check_coupled(self) -> "RunSpec":
        if self.bld.coupled in ("linear_and_no_op", "all") and self.scoring.composition == "subblocks":
            raise ValueError(
                f"bld.coupled is {self.bld.coupled}, and scoring.composition: subblocks adds up scores of halves, "
                "which a block that is trained as a whole does not have: set scoring.composition to pairs, or "
                "bld.coupled to shortlist"
            )
        if self.variants.spans and self.search.iterations:
            raise ValueError(
                "search.iterations scores single layers of a child, which blocks in the place of several layers do not "
                "have: leave out search.iterations or variants.spans"
            )
        if (self.variants.spans or self.child.fuse_ffn) and self.rounds:
            raise ValueError(
                "rounds compares every child layer by layer with the first parent, which a child with fewer layers is "
                f"not: leave out rounds or {'variants.spans' if self.variants.spans else 'child.fuse_ffn'}"
            )
        return self

    @model_validator(mode="after")
    def _check_source(self) -> "RunSpec":
        if self.bld.source == "streamed" and self.runtime.task_runner == "dask":
            raise ValueError(
                "bld.source is streamed and runtime.task_runner is dask: variants share the parent's states within a "
                "process, and under Dask every one has a process of its own: set task_runner to threads, or bld.source "
                "to stored"
            )
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> "RunSpec":
        lengths = self.sequence_lengths
        trainings: dict[str, Any] = {
            "bld": self.bld,
            **dict(zip(("gkd", "gkd.long"), self.gkd.trainings, strict=False)),
            **{f"rounds.{number}.gkd": self.of_round(number).gkd for number in range(len(self.rounds))},
        }
        for name, training in trainings.items():
            own = f"{'gkd' if name.startswith('rounds') else name}.sequence_length"
            field = own if own in lengths else "data.sequence_length"
            batch, micro = training.batch_tokens, getattr(training, "micro_batch_tokens", None)
            if micro and batch % micro:
                raise ValueError(f"{name}.batch_tokens must be a multiple of {name}.micro_batch_tokens")
            for part, tokens in {"batch_tokens": batch, "micro_batch_tokens": micro or batch}.items():
                if tokens % lengths[field]:
                    raise ValueError(f"{name}.{part} is {tokens}, not a multiple of {field} ({lengths[field]})")
        return self


def parse_spec(content: dict[str, Any], origin: str) -> RunSpec:
    """Validate a spec given as plain values.

    Raises:
        SpecError: lists every wrong key and value, one per line.
    """
    return parse_record(RunSpec, content, origin, "spec")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain values, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{name}".lstrip("."))
