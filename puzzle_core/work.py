"""What every stage is asked to do, and what it answers: the contract between flows, tasks and core. No torch.

A `Work` is complete: its digest is the key of the artifact that it leads to (DESIGN rule 3). Inputs are named by
their keys. A `Record` is what the stage found out; tensors lie beside it in the artifact.
"""

from typing import ClassVar, Literal

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, VariantId
from puzzle_core.records import Record, Work
from puzzle_core.spec import (
    BldSpec,
    Dtype,
    GkdSpec,
    RunSpec,
    SearchRequest,
    TargetSpec,
    VariantsSpec,
)


class TokensWork(Work):
    """One split of packed windows; `earlier_splits` are the splits that took their tokens first."""

    stage: ClassVar[str] = "tokens"
    version: ClassVar[int] = 2

    split: str
    tokens: int
    earlier_splits: tuple[tuple[str, int], ...]
    sequence_length: int
    seed: int
    cut_documents: bool
    document_start: str
    texts: str
    tokenizer: str


class TokensRecord(Record):
    """What was packed."""

    windows: int
    tokens: int
    bytes_per_token: float


class ImportanceWork(Work):
    """Channel contributions of one parent on one set of tokens."""

    stage: ClassVar[str] = "importance"
    version: ClassVar[int] = 1

    parent: str
    tokens: str


class ImportanceRecord(Record):
    """How the contributions came to be."""

    layers: int
    tokens: int


class BldWork(Work):
    """One variant of one layer."""

    stage: ClassVar[str] = "bld"
    version: ClassVar[int] = 1

    parent: str
    layer: int
    variant: VariantId
    tokens: str
    contributions: str | None
    spec: BldSpec


class BldRecord(Record):
    """How a variant's training went; losses are normalised MSE, without unit."""

    layer: int
    variant: VariantId
    initial_loss: float
    final_loss: float
    curve: tuple[float, ...]
    tokens: int
    seconds: float


class AssembleWork(Work):
    """One architecture; `library` has the keys of the trained variants of each layer, by variant id."""

    stage: ClassVar[str] = "child"
    version: ClassVar[int] = 1

    parent: str
    architecture: Architecture
    library: tuple[tuple[tuple[str, str], ...], ...]
    dtype: Dtype


class ScoreWork(Work):
    """One block variant in one layer; the library keys of its trained variants, none for the parent's own and no-ops.

    The block replaces one of the parent's, or of the child `base`.
    """

    stage: ClassVar[str] = "score"
    version: ClassVar[int] = 2

    parent: str
    layer: int
    block: BlockVariant
    attention: str | None
    ffn: str | None
    tokens: str
    dtype: Dtype
    base: AssembleWork | None = None


class ScoreRecord(Record):
    """What replacing one block costs."""

    layer: int
    block: BlockVariant
    kl_nats_per_token: float
    lm_loss_increase_nats_per_token: float
    top1_agreement: float
    tokens: int


class Traffic(Record):
    """The part of a scenario that times depend on, at one batch size."""

    prompt_tokens: int
    generated_tokens: int
    batch_size: int


class CostWork(Work):
    """Times of distinct variants for one traffic on one device."""

    stage: ClassVar[str] = "cost"
    version: ClassVar[int] = 2

    shape: str
    variants: tuple[VariantId, ...]
    traffic: Traffic
    target: TargetSpec
    hardware: str


class Timing(Record):
    """Medians over rounds, and their relative spread (interquartile range over median); computed times spread by 0.

    `decode_ms` is the whole generation after the first token, `generated_tokens - 1` steps.
    """

    prefill_ms: float
    decode_ms: float
    prefill_spread: float = 0.0
    decode_spread: float = 0.0


class CostRecord(Record):
    """Times: of every variant per layer, of what lies outside the blocks, and of the whole parent.

    `weight_bytes` and `kv_bytes` are bytes per weight and per entry of the KV cache, in the precision that the times
    hold for. `torch_version`, `threads` and `rounds` are of a measurement. An `engine` other than torch is named with
    its version; `no_ffn` is what it spends on a layer that attends and has no FFN.
    """

    source: Literal["measured", "roofline", "imported"]
    variants: dict[str, Timing]
    outside: Timing
    parent: Timing
    hardware: str
    weight_bytes: float
    kv_bytes: float
    torch_version: str | None = None
    threads: int | None = None
    rounds: int | None = None
    engine: str | None = None
    no_ffn: Timing | None = None


class ChildRecord(Record):
    """What a child is."""

    architecture: Architecture
    parameters: int
    parameter_bytes: int


class GkdWork(Work):
    """One child to be distilled."""

    stage: ClassVar[str] = "gkd"
    version: ClassVar[int] = 1

    parent: str
    child: str
    architecture: Architecture
    tokens: str
    dtype: Dtype
    spec: GkdSpec


class GkdRecord(Record):
    """How the distillation went: the loss terms of every step."""

    architecture: Architecture
    curve: tuple[dict[str, float], ...]
    tokens: int
    seconds: float


class EvaluateWork(Work):
    """One child, or the parent itself when `child` is none."""

    stage: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 1

    parent: str
    child: str | None
    tokens: str
    lm_eval_tasks: tuple[str, ...] = ()


class EvaluationRecord(Record):
    """Quality on held-out tokens; `top1_agreement` and `kl_nats_per_token` compare with the parent."""

    kl_nats_per_token: float
    lm_loss_nats_per_token: float
    perplexity: float
    top1_accuracy: float
    top1_agreement: float
    tokens: int
    lm_eval: dict[str, dict[str, float]]


class SearchWork(Work):
    """One search: the space, the scores and costs by key, and what is asked.

    `costs` are (scenario, batch size, key) of cost records; an imported cost table has the digest of its file instead.
    With a `base`, scores are of blocks in that child.
    """

    stage: ClassVar[str] = "search"
    version: ClassVar[int] = 3

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


class RefineWork(Work):
    """Measuring what a search found, and searching again around the best: `tokens` are those that scores use."""

    stage: ClassVar[str] = "refine"
    version: ClassVar[int] = 1

    search: str
    tokens: str


class TimingWork(Work):
    """Several models timed end to end in turns: the parent and children, by name and architecture."""

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
    """One row of the final table: a model and where its evaluation lies."""

    name: str
    kind: Literal["parent", "child", "baseline"]
    architecture: Architecture
    evaluation: str


class ReportWork(Work):
    """Everything a report shows, by key; `spec` without its runtime part."""

    stage: ClassVar[str] = "report"
    version: ClassVar[int] = 3

    spec: RunSpec
    shape: ModelShape
    search: str
    bld: tuple[str, ...]
    scores: tuple[str, ...]
    refine: str | None
    costs: str | None
    gkd: str
    timing: TimingWork | None
    models: tuple[ReportedModel, ...]
