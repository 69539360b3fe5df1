"""The block library of a run as one JSON file, for tools that do not know the artifact store (docs/formats.md)."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from puzzle_core.architecture import ModelShape, TrainedId, VariantId
from puzzle_core.errors import ArtifactError
from puzzle_core.plan import Plan
from puzzle_core.records import Record, Work
from puzzle_core.spec import ScoringMethod
from puzzle_core.work import BldRecord, BldWork, ScoreRecord, ScoreWork


class StoredArtifact(NamedTuple):
    """What the store says of an artifact: its stage's record as plain values, and the bytes of its files."""

    record: dict[str, Any]
    size_bytes: int


class IndexedVariant(Record):
    """A trained variant, or an option whose halves are one artifact: where its weights are, and how well it imitates.

    Losses are MSE relative to that of an output of nothing, before BLD and after it.
    """

    variant: TrainedId
    key: str
    size_bytes: int
    initial_loss: float
    final_loss: float
    tokens: int


class IndexedScore(Record):
    """The replace-1-block score of a block variant, over the parent, whose own is 0. An estimate is of the KL alone."""

    attention: VariantId
    ffn: VariantId
    span: int = Field(1, exclude_if=lambda span: span == 1)
    key: str
    kl_nats_per_token: float
    lm_loss_increase_nats_per_token: float | None
    tokens: int
    method: ScoringMethod


class IndexedLayer(Record):
    """The trained variants of one layer, and the scores of its block variants; no-ops and the parent's own need no
    training."""

    layer: int
    variants: tuple[IndexedVariant, ...]
    scores: tuple[IndexedScore, ...]


class LibraryIndex(Record):
    """A whole block library. `store` and a `key` name the directory or prefix of an artifact's files."""

    format: Literal["puzzle-library/1"] = "puzzle-library/1"
    parent: str
    parent_digest: str
    shape: ModelShape
    store: str
    layers: tuple[IndexedLayer, ...]


def library_keys(plan: Plan) -> list[str]:
    """The keys of all artifacts that an index lists."""
    return [work.key for work in (*plan.all_bld(), *plan.all_scores())]


def library_index(plan: Plan, stored_artifacts: Mapping[str, StoredArtifact]) -> LibraryIndex:
    """The index of a run's library.

    Args:
        plan: the run.
        stored_artifacts: artifacts of the store by key; those of `library_keys` are looked up.

    Raises:
        ArtifactError: the library is not whole: says what is missing.
    """
    missing: list[Work] = [work for work in (*plan.all_bld(), *plan.all_scores()) if work.key not in stored_artifacts]
    if missing:
        variants = sum(isinstance(work, BldWork) for work in missing)
        raise ArtifactError(
            f"{plan.spec.runtime.store} lacks {variants} trained variants and {len(missing) - variants} scores of this "
            f"library (first {missing[0].key}): run `puzzle build-library` first"
        )
    layers = tuple(
        IndexedLayer(
            layer=layer,
            variants=tuple(_variants((work for work in plan.all_bld() if work.layer == layer), stored_artifacts)),
            scores=tuple(_scores((work for work in plan.all_scores() if work.layer == layer), stored_artifacts)),
        )
        for layer in plan.layers
    )
    return LibraryIndex(
        parent=plan.spec.parent.path,
        parent_digest=plan.inputs.parent,
        shape=plan.inputs.shape,
        store=plan.spec.runtime.store,
        layers=layers,
    )


def _variants(works: Iterable[BldWork], stored_artifacts: Mapping[str, StoredArtifact]) -> Iterable[IndexedVariant]:
    for work in works:
        stored = stored_artifacts[work.key]
        record = BldRecord.model_validate(stored.record)
        yield IndexedVariant(
            variant=record.variant,
            key=work.key,
            size_bytes=stored.size_bytes,
            initial_loss=record.initial_loss,
            final_loss=record.final_loss,
            tokens=record.tokens,
        )


def _scores(works: Iterable[ScoreWork], stored_artifacts: Mapping[str, StoredArtifact]) -> Iterable[IndexedScore]:
    for work in works:
        record = ScoreRecord.model_validate(stored_artifacts[work.key].record)
        yield IndexedScore(
            attention=record.block.attention,
            ffn=record.block.ffn,
            span=record.span,
            key=work.key,
            kl_nats_per_token=record.kl_nats_per_token,
            lm_loss_increase_nats_per_token=record.lm_loss_increase_nats_per_token,
            tokens=record.tokens,
            method=record.method,
        )
