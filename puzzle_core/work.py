"""Input and result of every stage: the contract between flows, tasks and core. No torch.

A `Work` is complete: its digest is the key of the stage's artifact (DESIGN rule 3). It names its inputs by their
keys. A `Record` is the result of the stage; the artifact holds its tensors in separate files.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Option, TrainedId, VariantId
from puzzle_core.records import Record, Work
from puzzle_core.spec import (
    BldSpec,
    Dtype,
    GkdSpec,
    HarnessSpec,
    RunSpec,
    ScoringMethod,
    SearchRequest,
    TargetSpec,
    VariantsSpec,
)


class TokensWork(Work):
    """One split of packed windows.

    `earlier_splits` are the splits that are packed before it, with their tokens; `earlier_lengths` are their tokens per
    window, where not all have this split's. With `documents`, the artifact says which document each token is of.
    """

    stage: ClassVar[str] = "tokens"
    version: ClassVar[int] = 2

    split: str
    tokens: int
    earlier_splits: tuple[tuple[str, int], ...]
    earlier_lengths: tuple[int, ...] = Field((), exclude_if=lambda lengths: not lengths)
    sequence_length: int
    seed: int
    cut_documents: bool
    document_start: str
    documents: bool = Field(False, exclude_if=lambda kept: not kept)
    texts: str
    tokenizer: str

    @property
    def before(self) -> "TokensWork | None":
        """The split that is packed before this one."""
        if not self.earlier_splits:
            return None
        *earlier, (split, tokens) = self.earlier_splits
        *lengths, length = self.earlier_lengths or [self.sequence_length] * len(self.earlier_splits)
        return self.after([(*pair, size) for pair, size in zip(earlier, lengths, strict=True)], split, tokens, length)

    def after(self, earlier: Sequence[tuple[str, int, int]], split: str, tokens: int, length: int) -> "TokensWork":
        """Another split of the same texts: `tokens` in windows of `length`, after earlier ones, given likewise."""
        lengths = tuple(size for *_, size in earlier)
        changes = {
            "split": split,
            "tokens": tokens,
            "sequence_length": length,
            "earlier_splits": tuple((name, count) for name, count, _ in earlier),
            "earlier_lengths": lengths if {*lengths} - {length} else (),
        }
        return self.model_copy(update=changes)


class TokensRecord(Record):
    """Size of a packed split.

    `end` is where the next split starts (`puzzle_core.data.Place`); artifacts from before it was recorded have none.
    """

    windows: int
    tokens: int
    bytes_per_token: float
    end: tuple[int, int] | None = None


class ImportanceWork(Work):
    """Channel contributions of one parent on one set of tokens."""

    stage: ClassVar[str] = "importance"
    version: ClassVar[int] = 1

    parent: str
    tokens: str


class ImportanceRecord(Record):
    """Layers and tokens that the contributions were computed on."""

    layers: int
    tokens: int


class BldWork(Work):
    """The training of one variant of one layer, or of both halves of an option together, whose first layer it is.

    `halves` are the library keys of the attention and of the FFN that an option starts from; None for the parent's own
    and for no-ops. `seed` is that of the order of the windows.
    """

    stage: ClassVar[str] = "bld"
    version: ClassVar[int] = 3

    parent: str
    layer: int
    variant: TrainedId
    tokens: str
    contributions: str | None
    halves: tuple[str | None, str | None] | None = Field(None, exclude_if=lambda keys: keys is None)
    seed: int
    spec: BldSpec

    @property
    def last_layer(self) -> int:
        """The layer whose output is the target."""
        return self.layer + self.variant.span - 1 if isinstance(self.variant, Option) else self.layer


class BldRecord(Record):
    """Result of a variant's training; losses are normalised MSE by `bld.loss`, without unit.

    `initial_loss` and `final_loss` are measured on the same held-back windows. `compared` has the loss of each way to
    start before training, by its name, on the first batch of these; the least one was taken. If training does not lower
    the loss, the initial weights are kept and both are equal. `curve` has the training loss of every step.
    """

    layer: int
    variant: TrainedId
    initial_loss: float
    compared: dict[str, float] = {}
    final_loss: float
    curve: tuple[float, ...]
    tokens: int
    seconds: float


class AssembleWork(Work):
    """One architecture; `library` has the keys of what was trained of each layer, by the id of a variant or option.

    With `fuse_ffn`, FFNs with no attention between them are one in the child.
    """

    stage: ClassVar[str] = "child"
    version: ClassVar[int] = 1

    parent: str
    architecture: Architecture
    library: tuple[tuple[tuple[str, str], ...], ...]
    dtype: Dtype
    fuse_ffn: bool = Field(False, exclude_if=lambda fuses: not fuses)


class GradientsWork(Work):
    """Gradients of one parent at the outputs of its layers, for `samples` draws of labels from its own predictions."""

    stage: ClassVar[str] = "gradients"
    version: ClassVar[int] = 1

    parent: str
    tokens: str
    dtype: Dtype
    samples: int
    seed: int


class GradientsRecord(Record):
    """Layers, label samples and tokens of the gradients."""

    layers: int
    samples: int
    tokens: int


class InfluenceWork(Work):
    """How much the layers of one parent change the hidden state, on one set of tokens."""

    stage: ClassVar[str] = "influence"
    version: ClassVar[int] = 1

    parent: str
    tokens: str
    dtype: Dtype


class InfluenceRecord(Record):
    """`influence[i][n]` is 1 - cos of what enters layer i and what leaves layer i+n, the mean over tokens."""

    influence: tuple[tuple[float, ...], ...]
    tokens: int


class ScoreWork(Work):
    """The score of one block variant in one layer.

    `attention` and `ffn` are library keys of trained variants, None for the parent's own variant and for no-ops;
    `whole` is that of a block whose halves were trained together. The block replaces `span` layers of the parent, or a
    block of the child `base`. A score that is estimated names its `gradients`.
    """

    stage: ClassVar[str] = "score"
    version: ClassVar[int] = 2

    parent: str
    layer: int
    block: BlockVariant
    span: int = Field(1, exclude_if=lambda span: span == 1)
    attention: str | None
    ffn: str | None
    whole: str | None = Field(None, exclude_if=lambda key: key is None)
    tokens: str
    dtype: Dtype
    base: AssembleWork | None = None
    gradients: str | None = Field(None, exclude_if=lambda key: key is None)

    @property
    def option(self) -> Option:
        """The block and the layers that it replaces."""
        return Option(self.block, self.span)

    @property
    def last_layer(self) -> int:
        """The last of the layers that the block replaces."""
        return self.layer + self.span - 1

    @property
    def trained(self) -> dict[str, str]:
        """The library keys of what the block is made of, by the id of a variant or option."""
        if self.whole:
            return {str(self.option): self.whole}
        keys = zip(self.block.subblocks, (self.attention, self.ffn), strict=True)
        return {str(variant): key for variant, key in keys if key}


class ScoreRecord(Record):
    """Loss of quality from the replacement of one block. `fisher` estimates the KL alone."""

    layer: int
    block: BlockVariant
    span: int = Field(1, exclude_if=lambda span: span == 1)
    kl_nats_per_token: float
    lm_loss_increase_nats_per_token: float | None = None
    top1_agreement: float | None = None
    tokens: int
    method: ScoringMethod = "exact"

    @property
    def option(self) -> Option:
        """The block and the layers that it replaces."""
        return Option(self.block, self.span)


class Traffic(Record):
    """The part of a scenario that determines times, at one batch size."""

    prompt_tokens: int
    generated_tokens: int
    batch_size: int


class CostWork(Work):
    """Times of distinct variants for one traffic on one device; `formulas` is the version of computed ones."""

    stage: ClassVar[str] = "cost"
    version: ClassVar[int] = 2

    shape: str
    variants: tuple[VariantId, ...]
    traffic: Traffic
    target: TargetSpec
    hardware: str
    formulas: int | None = Field(None, exclude_if=lambda formulas: formulas is None)


class Timing(Record):
    """Medians over rounds, and their relative spread (interquartile range over median); computed times spread by 0.

    `decode_ms` is the whole generation after the first token, `generated_tokens - 1` steps.
    """

    prefill_ms: float
    decode_ms: float
    prefill_spread: float = 0.0
    decode_spread: float = 0.0


class CostRecord(Record):
    """Times of every variant, of the parts outside the blocks, and of the whole parent.

    `weight_bytes` and `kv_bytes` are bytes per weight and per entry of the KV cache, in the precision of the times.
    `embedding_bytes` are those of embedding and head where they differ, and `tensor_parallel` the devices that share
    every layer. `torch_version`, `threads` and `rounds` describe a measurement. `engine` has name and version of an
    engine other than torch; `no_ffn` is its time for a layer with an attention and without an FFN.
    """

    source: Literal["measured", "roofline", "imported"]
    variants: dict[str, Timing]
    outside: Timing
    parent: Timing
    hardware: str
    weight_bytes: float
    kv_bytes: float
    embedding_bytes: float | None = Field(None, exclude_if=lambda size: size is None)
    tensor_parallel: int = Field(1, exclude_if=lambda devices: devices == 1)
    torch_version: str | None = None
    threads: int | None = None
    rounds: int | None = None
    engine: str | None = None
    no_ffn: Timing | None = None


class ChildRecord(Record):
    """Architecture and size of a child; `unfused` is the architecture before FFN fusion, where there was one."""

    architecture: Architecture
    unfused: Architecture | None = None
    parameters: int
    parameter_bytes: int


class GkdWork(Work):
    """The global distillation of one child, assembled or distilled before; `seed` is of the order of the windows."""

    stage: ClassVar[str] = "gkd"
    version: ClassVar[int] = 2

    parent: str
    child: str
    architecture: Architecture
    tokens: str
    dtype: Dtype
    seed: int
    spec: GkdSpec


class HeldBackKl(Record):
    """KL to the parent on held-back windows after `step` steps."""

    step: int
    kl_nats_per_token: float


class GkdRecord(Record):
    """Result of the distillation; `curve` has the loss terms of every step.

    `held_back` has what was measured on held-back windows, at step 0 first; it is empty without checks.
    """

    architecture: Architecture
    curve: tuple[dict[str, float], ...]
    held_back: tuple[HeldBackKl, ...] = ()
    tokens: int
    seconds: float

    @property
    def best(self) -> HeldBackKl | None:
        """The measurement of the weights that the child got."""
        return min(self.held_back, key=lambda point: point.kl_nats_per_token, default=None)


class MultipleChoiceWork(Record):
    """A multiple-choice benchmark: its name and the digest of its items."""

    name: str
    items: str


class EvaluateWork(Work):
    """The evaluation of one child, or of the parent if `child` is None.

    `lm_eval.task_folder` is the digest of the folder's files.
    """

    stage: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 1

    parent: str
    child: str | None
    tokens: str
    dtype: Dtype = Field("float32", exclude_if=lambda dtype: dtype == "float32")
    tasks: tuple[MultipleChoiceWork, ...] = Field((), exclude_if=lambda tasks: not tasks)
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval: HarnessSpec = Field(HarnessSpec(), exclude_if=lambda options: options == HarnessSpec())


class MultipleChoiceResult(Record):
    """Accuracy on one multiple-choice benchmark, and standard errors of the mean over its items.

    The likeliest choice is the model's answer. `by_length` divides log-likelihoods by the characters of the choice.
    """

    name: str
    items: int
    accuracy: float
    standard_error: float
    accuracy_by_length: float
    standard_error_by_length: float


class EvaluationRecord(Record):
    """Quality on held-out tokens; `top1_agreement` and `kl_nats_per_token` compare with the parent.

    `tasks` are in the order of the spec.
    """

    kl_nats_per_token: float
    lm_loss_nats_per_token: float
    perplexity: float
    top1_accuracy: float
    top1_agreement: float
    tokens: int
    lm_eval: dict[str, dict[str, float]]
    tasks: tuple[MultipleChoiceResult, ...] = ()


class SearchWork(Work):
    """One search: the space, the keys of scores and costs, and the request.

    `costs` are (scenario, batch size, key) of cost records; an imported cost table has the digest of its file instead.
    With a `base`, the scores hold for blocks in that child. `first` is the first parent of iterated Puzzle, where the
    parent is a child of it: shares in limits are of its values. `exact` are the exact scores that a search over
    estimates may use: the estimates alone decide which of them it uses, and in which order it asks for them.
    `influence` is what baselines that drop layers choose by. `long_scores` are of the same blocks on longer windows,
    and count `long_weight` times.
    """

    stage: ClassVar[str] = "search"
    version: ClassVar[int] = 6

    parent: str
    shape: ModelShape
    variants: VariantsSpec
    scores: tuple[str, ...]
    composition: Literal["pairs", "subblocks"]
    costs: tuple[tuple[str, int, str], ...]
    cost_table: str | None
    target: str
    request: SearchRequest
    base: AssembleWork | None = None
    first: ModelShape | None = Field(None, exclude_if=lambda shape: shape is None)
    exact: tuple[str, ...] = Field((), exclude_if=lambda keys: not keys)
    influence: str | None = Field(None, exclude_if=lambda key: key is None)
    long_scores: tuple[str, ...] = Field((), exclude_if=lambda keys: not keys)
    long_weight: float = Field(1.0, exclude_if=lambda weight: weight == 1)


class RefineWork(Work):
    """Measurement of a search's candidates, and further searches around the best one. `tokens` is the scoring split."""

    stage: ClassVar[str] = "refine"
    version: ClassVar[int] = 1

    search: str
    tokens: str


class TimingWork(Work):
    """End-to-end times of several models, measured in alternation: parent and children by name and architecture."""

    stage: ClassVar[str] = "timing"
    version: ClassVar[int] = 1

    shape: str
    architectures: tuple[tuple[str, Architecture], ...]
    traffic: Traffic
    target: TargetSpec
    hardware: str


class TimingRecord(Record):
    """End-to-end times by model name."""

    models: dict[str, Timing]
    hardware: str


class ReportedModel(Record):
    """One row of the final table: a model and the key of its evaluation."""

    name: str
    kind: Literal["parent", "round", "child", "baseline"]
    architecture: Architecture
    evaluation: str


class ReportWork(Work):
    """Everything that a report shows, by key. `spec` is `Plan.spec_of_content`, which has no paths.

    `gkd` is the distillation that gave the child, `first_gkd` the one before it where there are two. Where children
    became parents, `shape` is that of the first parent, and `scored` that of the last, whose blocks have the scores.
    """

    stage: ClassVar[str] = "report"
    version: ClassVar[int] = 5

    spec: RunSpec
    shape: ModelShape
    scored: ModelShape | None = Field(None, exclude_if=lambda shape: shape is None)
    search: str
    bld: tuple[str, ...]
    scores: tuple[str, ...]
    refine: str | None
    costs: str | None
    gkd: str
    first_gkd: str | None = Field(None, exclude_if=lambda key: key is None)
    timing: TimingWork | None
    models: tuple[ReportedModel, ...]

    @property
    def trainings(self) -> tuple[str, ...]:
        """The keys of all distillations of the child, in their order."""
        return (self.first_gkd, self.gkd) if self.first_gkd else (self.gkd,)
