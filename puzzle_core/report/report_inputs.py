"""What a report is made of: the records of one whole run, and the models that it ends in. No torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.records import Record
from puzzle_core.search.search_record import RefineRecord, SearchRecord
from puzzle_core.spec import RunSpec
from puzzle_core.work import BldRecord, CostRecord, EvaluationRecord, GkdRecord, ScoreRecord, Timing


class ModelResult(Record):
    """One model: what it is made of, how good and how fast it was measured to be."""

    name: str
    kind: Literal["parent", "round", "child", "baseline"]
    architecture: Architecture
    evaluation: EvaluationRecord
    timing: Timing | None
    parameters: int
    memory_bytes: float = Field(description="Parameters plus KV cache at the full context of the batch")


class StageUsage(Record):
    """The artifacts of one stage: their number, bytes, and the device-seconds that they took, by kind of device.

    `unknown` of them do not say what they took: an older version made them.
    """

    stage: str
    artifacts: int
    size_bytes: int
    core_seconds: float
    gpu_seconds: float
    unknown: int = 0


class ReportInputs(Record):
    """Everything that a report shows.

    Models are listed in the order parent, children of earlier rounds, children as they came to be, baselines.
    """

    spec: RunSpec = Field(description="With digests in place of the paths of parent, texts and cost table")
    parent_name: str = Field("", description="How the report calls the parent")
    shape: ModelShape
    scored: ModelShape | None = Field(
        None,
        description="The last round's parent, whose blocks have the scores, where children became parents",
        exclude_if=lambda shape: shape is None,
    )
    search: SearchRecord
    bld: tuple[BldRecord, ...]
    scores: tuple[ScoreRecord, ...]
    costs: CostRecord | None = Field(description="Of the batch size that the search chose; none of an imported table")
    refine: RefineRecord | None = None
    gkd: GkdRecord | None
    long_gkd: GkdRecord | None = Field(
        None, description="The second training, on longer windows", exclude_if=lambda record: record is None
    )
    models: tuple[ModelResult, ...]
    artifacts: dict[str, str] = Field(description="Store keys by name")
    usages: tuple[StageUsage, ...] = Field(
        (), description="What all artifacts before the report took", exclude_if=lambda usages: not usages
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        kinds = [model.kind for model in self.models]
        if kinds.count("parent") != 1 or "child" not in kinds:
            raise ValueError(f"a report needs one parent and at least one child, and got the models {kinds}")
        for model in self.models:
            if len(model.architecture.layers) != self.shape.layers:
                raise ValueError(
                    f"{model.name} has {len(model.architecture.layers)} layers, its parent {self.shape.layers}"
                )
        return self

    @property
    def trainings(self) -> tuple[GkdRecord, ...]:
        """The global distillations of the child, in their order."""
        return tuple(record for record in (self.gkd, self.long_gkd) if record)

    @property
    def parent(self) -> ModelResult:
        """The model that the run started from."""
        return next(model for model in self.models if model.kind == "parent")

    @property
    def scored_shape(self) -> ModelShape:
        """The parent in which blocks were scored: the last round's."""
        return self.scored or self.shape

    @property
    def rounds(self) -> tuple[ModelResult, ...]:
        """The children of earlier rounds, which became parents."""
        return tuple(model for model in self.models if model.kind == "round")

    @property
    def children(self) -> tuple[ModelResult, ...]:
        """The child after each step of its making."""
        return tuple(model for model in self.models if model.kind == "child")

    @property
    def child(self) -> ModelResult:
        """The child as it is delivered."""
        return self.children[-1]

    @property
    def chosen(self) -> ModelResult:
        """The child as the search chose it, before its FFNs were fused and before GKD."""
        return self.children[0]

    @property
    def baselines(self) -> tuple[ModelResult, ...]:
        """What other ways to choose lead to, assembled but not distilled."""
        return tuple(model for model in self.models if model.kind == "baseline")

    @property
    def batch_size(self) -> int:
        """The batch size that the search chose, which all times hold for."""
        return self.search.best.prediction.batch_size
