"""The run specification: everything a run depends on, as one frozen record read from YAML or from the UI's form.

Each stage's own part enters the key of its artifacts; `runtime` (where things lie, how many workers) enters none,
so equal work has an equal key on every machine.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from puzzle_core.architecture import BlockVariant, ModelShape, Variant
from puzzle_core.errors import SpecError
from puzzle_core.quantities import parse_bytes, parse_seconds, parse_share, parse_throughput
from puzzle_core.records import Record

Dtype = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class ParentSpec(Record):
    """The model to start from."""

    path: str = Field(description="Directory or hub id of a Hugging Face causal LM of the Llama pattern")
    revision: str | None = Field(None, description="Hub revision; ignored for a directory")
    allow_remote_code: str | None = Field(
        None,
        description="Name of the one class that the checkpoint's own code may define, for instance "
        "'tokenization_x.XTokenizer'; nothing is imported from a checkpoint otherwise",
    )


class DataSpec(Record):
    """Where tokens come from."""

    train_texts: tuple[str, ...] = Field(
        ("python-stdlib:train",), min_length=1, description="Text sources for calibration, BLD and GKD"
    )
    held_out_texts: tuple[str, ...] = Field(
        ("python-stdlib:held-out",), min_length=1, description="Text sources for scoring and evaluation"
    )
    sequence_length: int = Field(256, ge=8, description="Tokens per window")
    seed: int = Field(0, description="Order of the documents")


class VariantRange(Record):
    """Other variants for some layers; what is not said here is as for all layers."""

    first_layer: int = Field(ge=0)
    last_layer: int = Field(ge=0, description="Included")
    kv_heads: tuple[Positive, ...] | None = None
    ffn_ratios: tuple[Share, ...] | None = None
    ffn_widths: tuple[Positive, ...] | None = None
    linear: bool | None = None
    no_op: bool | None = None

    @model_validator(mode="after")
    def _some_layer(self) -> "VariantRange":
        if self.last_layer < self.first_layer:
            raise ValueError(f"last_layer ({self.last_layer}) comes before first_layer ({self.first_layer})")
        return self


class VariantsSpec(Record):
    """The search space: the variants of every layer. The parent's own variant is always among them."""

    kv_heads: tuple[Positive, ...] = Field((), description="KV heads of reduced attentions; divisors of the parent's")
    ffn_ratios: tuple[Share, ...] = Field((), description="Widths of reduced FFNs as a share of the parent's")
    ffn_widths: tuple[Positive, ...] = Field((), description="Widths of reduced FFNs in channels")
    ffn_multiple_of: Positive = Field(1, description="Widths from ratios are rounded to a multiple of this")
    linear: bool = Field(True, description="Offer one linear layer in place of each subblock")
    no_op: bool = Field(True, description="Offer to leave out each subblock")
    layers: tuple[VariantRange, ...] = Field((), description="Exceptions for ranges of layers; later ones win")

    def of_layer(self, layer: int, shape: ModelShape) -> tuple[list[Variant], list[Variant]]:
        """Attention variants and FFN variants of one layer, the parent's own first.

        Raises:
            SpecError: a variant that this parent cannot have.
        """
        rules: dict[str, Any] = self.model_dump(exclude={"layers", "ffn_multiple_of"})
        for exception in self.layers:
            if exception.first_layer <= layer <= exception.last_layer:
                changes = exception.model_dump(exclude={"first_layer", "last_layer"}, exclude_none=True)
                if {"ffn_ratios", "ffn_widths"} & changes.keys():
                    rules |= {"ffn_ratios": (), "ffn_widths": ()}
                rules |= changes
        widths = {round(r * shape.ffn_width / self.ffn_multiple_of) * self.ffn_multiple_of for r in rules["ffn_ratios"]}
        widths = {max(w, self.ffn_multiple_of) for w in widths} | set(rules["ffn_widths"])
        sizes = {"attn": set(rules["kv_heads"]), "ffn": widths}
        parent = {"attn": shape.parent_block.attention, "ffn": shape.parent_block.ffn}
        found: dict[str, list[Variant]] = {}
        for subblock, own in parent.items():
            sized = [shape.check(Variant(own.subblock, "sized", n)) for n in sorted(sizes[subblock], reverse=True)]
            extras = [Variant(own.subblock, kind) for kind in ("linear", "no_op") if rules[kind]]  # type: ignore[arg-type]
            found[subblock] = [own, *(v for v in sized if v != own), *extras]
        return found["attn"], found["ffn"]

    def blocks_of_layer(self, layer: int, shape: ModelShape) -> list[BlockVariant]:
        """All pairs of one layer, the parent's own first."""
        attentions, ffns = self.of_layer(layer, shape)
        return [BlockVariant(attention=a, ffn=f) for a in attentions for f in ffns]


class ImportanceSpec(Record):
    """Channel contributions of the parent's FFNs (METHOD section 2)."""

    tokens: Positive = Field(65_536, description="Calibration tokens")


class OptimizerSpec(Record):
    """AdamW with warm-up, cosine decay to zero and gradient clipping."""

    learning_rate: float = Field(1e-3, gt=0)
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient")


class BldSpec(Record):
    """Blockwise local distillation (METHOD section 3)."""

    tokens: Positive = Field(262_144, description="Tokens that every variant is trained on")
    epochs: Positive = Field(1, description="Passes over these tokens")
    batch_tokens: Positive = 4096
    dtype: Dtype = Field("float32", description="Type of activations and matrix products; weights stay float32")
    optimizer: OptimizerSpec = OptimizerSpec()


class ScoringSpec(Record):
    """Replace-1-block scores (METHOD section 4)."""

    tokens: Positive = 16_384
    composition: Literal["pairs", "subblocks"] = Field(
        "pairs", description="Score every composed block, or single subblocks whose scores are added up"
    )
    dtype: Dtype = "float32"


class TargetSpec(Record):
    """The hardware target that costs are measured on."""

    name: str = "this-machine"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype = Field("float32", description="Type of weights, activations and KV cache when serving")
    threads: Positive = Field(1, description="CPU threads while measuring")
    rounds: int = Field(7, ge=3, description="Interleaved rounds; medians are kept")


class LimitsSpec(Record):
    """What the child must meet. Absolute with a unit (`80GiB`, `300ms`, `6000 tok/s`), or `60%` of the parent's."""

    memory: Annotated[str, BeforeValidator(parse_bytes.check)] | None = Field(
        None, description="At most: parameters plus KV cache at the full context of the batch"
    )
    parameters: Annotated[str, BeforeValidator(parse_bytes.check)] | None = Field(
        None, description="At most: bytes of all parameters"
    )
    throughput: Annotated[str, BeforeValidator(parse_throughput.check)] | None = Field(
        None, description="At least: generated tokens per second over prefill and decode"
    )
    time_to_first_token: Annotated[str, BeforeValidator(parse_seconds.check)] | None = Field(
        None, description="At most: prefill of the batch"
    )
    time_per_output_token: Annotated[str, BeforeValidator(parse_seconds.check)] | None = Field(
        None, description="At most: one decode step"
    )
    latency: Annotated[str, BeforeValidator(parse_seconds.check)] | None = Field(
        None, description="At most: prefill plus the whole generation"
    )
    block_time: Annotated[str, BeforeValidator(parse_share.check)] | None = Field(
        None, description="At most: share of the parent's prefill plus decode time in blocks, the rest not counted"
    )
    block_prefill_time: Annotated[str, BeforeValidator(parse_share.check)] | None = Field(
        None, description="At most: share of the parent's prefill time in blocks, what lies outside not counted"
    )
    block_decode_time: Annotated[str, BeforeValidator(parse_share.check)] | None = Field(
        None, description="At most: share of the parent's decode time in blocks, what lies outside not counted"
    )

    @model_validator(mode="after")
    def _some_limit(self) -> "LimitsSpec":
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"no limit given: set at least one of {', '.join(type(self).model_fields)}")
        return self


class ScenarioSpec(Record):
    """Traffic and limits."""

    name: str = "chatbot"
    prompt_tokens: Positive = 128
    generated_tokens: Positive = 128
    batch_sizes: tuple[Positive, ...] = Field((1,), min_length=1, description="Tried one by one; the best is kept")
    limits: LimitsSpec


class SearchSpec(Record):
    """The mixed-integer program (METHOD section 6)."""

    objective: Literal["kl", "lm_loss", "disagreement"] = Field("kl", description="Which score is minimised")
    solutions: Positive = Field(1, description="Diverse solutions; the best is assembled")
    alpha: Share = Field(0.8, description="Largest share of layers that two solutions have in common")
    time_limit_s: float = Field(60.0, gt=0)
    frontier_points: int = Field(12, ge=2, description="Points of score against block time in the report")
    baselines: tuple[Literal["greedy", "uniform", "random", "maximise_parameters"], ...] = Field(
        ("greedy", "uniform", "random", "maximise_parameters"),
        description="Other ways to choose, assembled and evaluated beside the child",
    )


class GkdSpec(Record):
    """Global knowledge distillation (METHOD section 7)."""

    tokens: Positive = 524_288
    epochs: Positive = 1
    batch_tokens: Positive = 4096
    micro_batch_tokens: Positive | None = Field(
        None, description="Tokens per forward pass; gradients add up to a batch"
    )
    cosine_weight: float = Field(1.0, ge=0, description="Weight of the sum over layers of 1 - cos(h_child, h_parent)")
    kl_weight: float = Field(1.0, ge=0, description="Weight of KL(parent || child) on logits")
    lm_weight: float = Field(0.0, ge=0, description="Weight of the next-token loss on the texts")
    dtype: Dtype = "float32"
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=5e-4)

    @model_validator(mode="after")
    def _some_loss(self) -> "GkdSpec":
        if not self.cosine_weight + self.kl_weight + self.lm_weight:
            raise ValueError("all weights are 0: nothing would be learnt; set cosine_weight or kl_weight above 0")
        return self


class EvaluationSpec(Record):
    """Parent against child on held-out text."""

    tokens: Positive = 65_536
    lm_eval_tasks: tuple[str, ...] = Field((), description="Tasks of lm-evaluation-harness, where it is installed")
    timing_rounds: int = Field(7, ge=3, description="Interleaved end-to-end timings of parent and child")


class RuntimeSpec(Record):
    """Where things lie and how many hands there are; enters no key."""

    store: str = Field(".puzzle/store", description="Artifact store: a directory or s3://bucket/prefix")
    scratch: str = Field(".puzzle/scratch", description="Local directory for activations and training checkpoints")
    mlflow_uri: str = Field("sqlite:///.puzzle/mlflow.db", description="MLflow tracking URI")
    mlflow_experiment: str = "puzzle"
    workers: Positive | None = Field(None, description="Tasks side by side; default one per core or GPU")
    checkpoint_seconds: float = Field(60.0, ge=0, description="Least time between two checkpoints of a training")


class RunSpec(Record):
    """From one parent to one child for one hardware target and scenario."""

    name: str = Field("puzzle", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    parent: ParentSpec
    data: DataSpec = DataSpec()
    variants: VariantsSpec = VariantsSpec()
    importance: ImportanceSpec = ImportanceSpec()
    bld: BldSpec = BldSpec()
    scoring: ScoringSpec = ScoringSpec()
    target: TargetSpec = TargetSpec()
    scenario: ScenarioSpec
    search: SearchSpec = SearchSpec()
    gkd: GkdSpec = GkdSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    runtime: RuntimeSpec = RuntimeSpec()

    @model_validator(mode="after")
    def _whole_windows(self) -> "RunSpec":
        window = self.data.sequence_length
        asked = {"bld.batch_tokens": self.bld.batch_tokens, "gkd.batch_tokens": self.gkd.batch_tokens}
        if self.gkd.micro_batch_tokens:
            asked["gkd.micro_batch_tokens"] = self.gkd.micro_batch_tokens
            if self.gkd.batch_tokens % self.gkd.micro_batch_tokens:
                raise ValueError("gkd.batch_tokens must be a multiple of gkd.micro_batch_tokens")
        for name, tokens in asked.items():
            if tokens % window:
                raise ValueError(f"{name} is {tokens}, not a multiple of data.sequence_length ({window})")
        return self


def load_spec(path: Path, overrides: tuple[str, ...] = ()) -> RunSpec:
    """Read a spec from YAML, with `key.path=value` overrides; relative parent and text paths are the file's.

    Raises:
        SpecError: the file is missing or not YAML, or a key or value is wrong; names the key and the nearest known one.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the spec {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds no keys: a spec starts with `parent:` (see deployments/specs/quickstart.yaml)")
    _resolve_paths(content, path.resolve().parent)
    for override in overrides:
        _apply_override(content, override)
    return parse_spec(content, str(path))


def parse_spec(content: dict[str, Any], origin: str) -> RunSpec:
    """Validate a spec given as plain values.

    Raises:
        SpecError: every wrong key and value, one per line.
    """
    try:
        return RunSpec.model_validate(content)
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors(include_url=False)]
        raise SpecError(f"{origin} is not a valid spec:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _explain(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "spec"
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        nearest = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(known)}"
        return f"{place}: unknown key; {hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict) or error["type"] == "missing" else f" (found {error['input']!r})"
    return f"{place}: {message}{found}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunSpec
    for part in location:
        if isinstance(part, str):
            annotation: Any = model.model_fields[part].annotation
            model = next(
                (a for a in (annotation, *getattr(annotation, "__args__", ())) if _is_record(a)),
                model,
            )
    return list(model.model_fields)


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise SpecError(f"--set {override!r}: say key.path=value, for instance --set parent.path=/models/mine")
    *parents, last = key.split(".")
    place = content
    for part in parents:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise SpecError(f"--set {override!r}: {part!r} holds a value, not keys")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override!r}: the value is not YAML: {error}") from error


def _resolve_paths(content: dict[str, Any], directory: Path) -> None:
    def resolve(value: Any) -> Any:
        local = isinstance(value, str) and (directory / value).exists()
        return str((directory / value).resolve()) if local else value

    parent, data = content.get("parent"), content.get("data")
    if isinstance(parent, dict) and "path" in parent:
        parent["path"] = resolve(parent["path"])
    for key in ("train_texts", "held_out_texts"):
        if isinstance(data, dict) and isinstance(data.get(key), list):
            data[key] = [resolve(text) for text in data[key]]
