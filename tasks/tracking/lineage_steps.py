"""The steps of the lineage as models for MLflow: parent, library, scores, costs, architecture; and their tables.

A step names its sources by key. Its model has a table of the artifacts that it consists of.
"""

import csv
import hashlib
import io
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path

from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.report.units import count_text, number_text, percent_text
from puzzle_core.search.search_record import FoundArchitecture, RefineRecord, SearchRecord
from puzzle_core.sizes import architecture_parameters
from puzzle_core.work import BldRecord, GkdRecord
from tasks.runtime.context import RunContext
from tasks.store.store import Store
from tasks.tracking.live_curve import HELD_BACK_KL
from tasks.tracking.tracked_models import TrackedModel, Values, allowed_name

TABLE = "artifacts.csv"
COLUMNS = ("stage", "key", "uri", "bytes", "sha256_of_record", "made_by", "made_at")
CURVE_POINTS = 100


class Steps:
    """The models of a plan, from the parent to the architecture; each is built when it is first read.

    In a later round of iterated Puzzle the parent is the child of the round before, which MLflow knows as that child.
    """

    def __init__(self, plan: Plan, context: RunContext):
        self._plan, self._store = plan, context.store()
        self.bld = [work.key for work in plan.all_bld()]
        self.scored = [work.key for work in plan.all_scores()]
        tokens = [plan.tokens(split).key for split in ("calibration", "bld")]
        self.library_keys = (*tokens, plan.importance().key, *self.bld)
        gradients = plan.gradients()
        scoring = [*(plan.tokens(split).key for split in plan.scoring_splits), *([gradients.key] if gradients else [])]
        self.score_keys = (*scoring, *self.scored, *(work.key for work in plan.long_scores()))
        self.cost_keys = tuple(work.key for work in plan.costs().values())

    def all(self) -> list[TrackedModel]:
        """Every step, each after its sources."""
        steps = [self.first_parent, self.library, self.scores, self.costs, self.architecture]
        steps[1:1] = [self.parent] if self._plan.round else []
        return steps if self.answer.key == self.architecture.key else [*steps, self.answer]

    @property
    def descent(self) -> dict[str, str]:
        """The keys of the steps that the child is made from."""
        return {"parent": self.parent.key, "library": self.library.key, "architecture": self.answer.key}

    @cached_property
    def parent(self) -> TrackedModel:
        """The parent model of the round."""
        if not self._plan.round:
            return self.first_parent
        name = child_name(self._plan.spec.name, self._plan.round - 1)
        return TrackedModel(kind="child", name=name, key=self._plan.inputs.parent)

    @cached_property
    def first_parent(self) -> TrackedModel:
        """The parent model that the specification names."""
        first, path = self._plan.inputs.first, self._plan.spec.parent.path
        shape = first.shape
        parameters = architecture_parameters(shape, Architecture.of_parent(shape))
        return TrackedModel(
            kind="parent",
            name=allowed_name(Path(path).name),
            key=f"parent/{first.parent}",
            headline=f"{count_text(parameters)} parameters, {shape.layers} layers, {shape.family}: {path}",
            about={"path": path}
            | shape.model_dump(exclude={"blocks"})
            | {f"layer.{layer}": str(block) for layer, block in enumerate(shape.blocks)},
        )

    @cached_property
    def library(self) -> TrackedModel:
        """The block library: all trained variants."""
        spec, layers = self._plan.spec, len(self._plan.layers)
        return TrackedModel(
            kind="block-library",
            name="block-library",
            key=f"library/{_digest(self.bld)}",
            sources=(self.parent.key,),
            headline=f"{len(self.bld)} variants of {layers} layers, {count_text(spec.bld.tokens)} tokens each",
            about={"parent": self.parent.key, "variants": len(self.bld)} | spec.bld.model_dump(exclude={"optimizer"}),
            files=partial(self._table, self.library_keys),
            curve=lambda: [p for key in self.bld for p in bld_curve(self._store.record(BldRecord, key))],
        )

    @cached_property
    def scores(self) -> TrackedModel:
        """The replace-1-block scores."""
        spec = self._plan.spec.scoring
        return TrackedModel(
            kind="scores",
            name="scores",
            key=f"scores/{_digest(self.scored)}",
            sources=(self.library.key, self.parent.key),
            headline=f"{len(self.scored)} block variants, each on {count_text(spec.tokens)} held-out tokens"
            + ("" if spec.method == "exact" else ", estimated from gradients"),
            about={"library": self.library.key, "blocks": len(self.scored)} | spec.model_dump(),
            files=partial(self._table, self.score_keys),
        )

    @cached_property
    def costs(self) -> TrackedModel:
        """The costs of every variant on the target."""
        target, scenarios = self._plan.spec.target, self._plan.spec.scenarios
        traffic = "; ".join(f"{s.name}, batch {', '.join(map(str, s.batch_sizes))}" for s in scenarios)
        return TrackedModel(
            kind="cost-table",
            name=f"costs-{allowed_name(target.name)}",
            key=f"costs/{_digest([*self.cost_keys, self._plan.inputs.cost_table or ''])}",
            sources=(self.first_parent.key,),
            headline=f"{target.costs} for {target.name} ({self._plan.inputs.hardware}): {traffic}",
            about={"target": target.name, "hardware": self._plan.inputs.hardware, "costs": target.costs},
            files=partial(self._table, self.cost_keys),
        )

    @cached_property
    def architecture(self) -> TrackedModel:
        """The architecture that the search chose."""
        key = self._plan.search().key
        chosen = self._store.record(SearchRecord, key).best
        return self._architecture("architecture", key, (self.scores.key, self.costs.key), chosen, "")

    @cached_property
    def answer(self) -> TrackedModel:
        """The architecture of the child: the search's choice, or the best measured candidate where it was refined."""
        refine = self._plan.refine()
        if refine is None:
            return self.architecture
        record = self._store.record(RefineRecord, refine.key)
        best = record.candidates[record.best]
        remark = f"measured KL {number_text(best.measured_kl)}, best of {len(record.candidates)}; "
        return self._architecture(
            "refined", refine.key, (self.architecture.key, self.library.key), best.solution, remark
        )

    def _architecture(
        self, name: str, key: str, sources: tuple[str, ...], found: FoundArchitecture, remark: str
    ) -> TrackedModel:
        used = [f"{use.name} {use.text} used to {percent_text(use.share)}" for use in found.limits if use.share]
        about: dict[str, object] = {"library": self.library.key, "score": found.score}
        return TrackedModel(
            kind="architecture",
            name=f"{name}-{self._plan.spec.name}",
            key=key,
            sources=sources,
            headline=f"{remark}predicted score {number_text(found.score)}; {', '.join(used)}",
            about=about | {f"layer.{layer}": str(option) for layer, option in found.architecture.options.items()},
            files=partial(self._table, (key,)),
        )

    def _table(self, keys: tuple[str, ...]) -> dict[str, str]:
        stored = self._store.keys()  # the tokens of a library may be gone: later stages do not read them
        return {TABLE: artifact_table(self._store, [key for key in keys if key in stored])}


def child_name(spec_name: str, round_number: int | None = None) -> str:
    """The name of a specification's child, or of the child of an earlier round, counted from 0."""
    return f"child-{spec_name}" if round_number is None else f"child-{spec_name}-round-{round_number + 1}"


def artifact_table(store: Store, keys: Iterable[str]) -> str:
    """Artifacts as CSV, with the columns COLUMNS; the digest is that of the file `record.json`."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(COLUMNS)
    for key, manifest in store.manifests(keys).items():
        digest = hashlib.sha256(f"{manifest.model_dump_json(indent=1)}\n".encode()).hexdigest()
        uri = uri_of(store, key)
        rows.writerow([key.split("/")[0], key, uri, manifest.size_bytes, digest, manifest.made_by, manifest.made_at])
    return out.getvalue()


def uri_of(store: Store, key: str) -> str:
    """The URI of an artifact, which is valid in any directory."""
    return f"{store.place}/{key}"


def bld_curve(trained: BldRecord) -> Values:
    """BLD loss by step: at most CURVE_POINTS points, the last one among them."""
    name, steps = f"bld/layer {trained.layer:02d} {trained.variant}", len(trained.curve)
    every = -(-steps // CURVE_POINTS)
    return [(name, trained.curve[step - 1], step) for step in range(steps, 0, -every)][::-1]


def gkd_curve(label: str, distilled: GkdRecord) -> Values:
    """GKD loss and its terms by step, and KL on held-back windows; `label` is the split that it read."""
    curve = enumerate(distilled.curve, start=1)
    values = [(f"{label}/{name}", value, step) for step, terms in curve for name, value in terms.items()]
    return values + [(f"{label}/{HELD_BACK_KL}", point.kl_nats_per_token, point.step) for point in distilled.held_back]


def _digest(keys: list[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:40]
