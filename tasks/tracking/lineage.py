"""What each flow notes in MLflow: figures of its stage, the texts it read, and the models that it used and made.

Noted from manifests, never from inside a cached task: a run that finds its work in the store has the same lineage.
Every step from the parent to the child is a logged model that names what it was made from; beside it lies a table of
the artifacts it stands for.
"""

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec

from puzzle_core.errors import ArtifactError, DamagedError
from puzzle_core.plan import Plan
from puzzle_core.records import Work, digest_file
from puzzle_core.search.search_record import RefineRecord, SearchRecord
from puzzle_core.work import BldRecord, GkdRecord, ReportWork, ScoreRecord
from tasks.runtime.context import RunContext
from tasks.tracking.lineage_steps import (
    TABLE,
    Steps,
    ancestors,
    artifact_table,
    bld_curve,
    gkd_curve,
    record_of,
    uri_of,
)
from tasks.tracking.tracked_models import Model, Version, allowed_name
from tasks.tracking.tracking import Texts, TrackedRun, current_run, track_use

log = logging.getLogger("puzzle")
P = ParamSpec("P")
CARD, FILES = "README.md", "files.csv"
LIVE_SECONDS = 5.0


def _as_far_as_there(note: Callable[P, None]) -> Callable[P, None]:
    """Where artifacts that only lineage asks for are gone from the store, the run is whole without: say so."""

    @functools.wraps(note)
    def try_to_note(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            note(*args, **kwargs)
        except ArtifactError as error:
            if isinstance(error, DamagedError):
                raise
            log.warning("MLflow is not told all of this run: %s", error)

    return try_to_note


class LiveCurve:
    """A training's losses while it goes on, logged every few seconds."""

    def __init__(self, run: TrackedRun, name: str):
        self._run, self._name, self._waiting, self._sent = run, name, list[tuple[str, float, int]](), time.monotonic()

    def add(self, step: int, losses: dict[str, float], last: bool) -> None:
        """Keep the losses of a step, and send what was kept if it is time."""
        self._waiting += [(f"{self._name}/{name}", loss, step) for name, loss in losses.items()]
        if last or time.monotonic() - self._sent > LIVE_SECONDS:
            self._run.metrics(self._waiting)
            self._waiting, self._sent = [], time.monotonic()


def record_trained(works: Iterable[Work], context: RunContext) -> None:
    """Loss curves of variants that were trained just now, in the run around."""
    run = current_run()
    if run:
        run.metrics([point for work in works for point in bld_curve(record_of(BldRecord, work.key, context))])


@_as_far_as_there
def record_library(plan: Plan, context: RunContext, run: TrackedRun) -> None:
    """Final BLD loss per variant and KL per block variant, by layer; library and scores, made from the parent."""
    steps, metrics = Steps(plan, context), []
    context.store().pack((*steps.bld, *steps.scored))  # read here, and for later runs
    for key in steps.bld:
        trained = record_of(BldRecord, key, context)
        metrics.append((f"bld_loss/{trained.variant}", trained.final_loss, trained.layer))
    for key in steps.scored:
        scored = record_of(ScoreRecord, key, context)
        metrics.append((f"kl/{scored.block}", scored.kl_nats_per_token, scored.layer))
    run.metrics(metrics)
    run.reads(_texts(plan, context, "calibration", "bld", "scoring"))
    run.text(artifact_table(context.store(), (*steps.library_keys, *steps.score_keys)), TABLE)
    run.uses(steps.parent)
    run.makes(steps.library)
    run.makes(steps.scores)


@_as_far_as_there
def record_architecture(plan: Plan, context: RunContext, run: TrackedRun, key: str) -> None:
    """The search's answer; the architecture, made from the scores and the costs."""
    steps, chosen = Steps(plan, context), record_of(SearchRecord, key, context).chosen
    run.metrics([("score", chosen.score, 0), ("gap", chosen.gap, 0), ("batch_size", chosen.prediction.batch_size, 0)])
    run.metrics([(f"limit/{limit.name}", limit.used / limit.allowed, 0) for limit in chosen.limits])
    run.text(artifact_table(context.store(), (*steps.cost_keys, key)), TABLE)
    run.uses(steps.parent, steps.library, steps.scores)
    run.makes(steps.costs)
    run.makes(steps.architecture)


@_as_far_as_there
def record_refined(plan: Plan, context: RunContext, run: TrackedRun, record: RefineRecord) -> None:
    """Predicted and measured KL of every candidate, in the order they were found; the best, made from the search."""
    for step, candidate in enumerate(record.candidates):
        run.metrics([("kl_predicted", candidate.found.score, step), ("kl_measured", candidate.measured_kl, step)])
    steps = Steps(plan, context)
    run.uses(steps.library, steps.architecture)
    run.makes(steps.answer)


@_as_far_as_there
def record_child(plan: Plan, context: RunContext, run: TrackedRun, work: ReportWork) -> None:
    """The child's quality; the child, made from the parent, the library and the architecture, as a registered version.

    Args:
        work: the report of the run, which names everything that is said of the child.
    """
    from puzzle_core.report import collect, derived, report

    steps = Steps(plan, context)
    inputs = collect.collect(work, lambda key: context.store().manifest(key).record)
    numbers, said = derived.headline(inputs), report.headline_sentence(inputs)
    quality = inputs.child.evaluation
    run.metrics([("perplexity", quality.perplexity, 0), ("top1_accuracy", quality.top1_accuracy, 0)])
    run.metrics([(name, value, 0) for name, value in numbers.items()])
    keys = _child_keys(plan, work)
    run.reads(_texts(plan, context, "gkd", "evaluation"))
    run.text(artifact_table(context.store(), keys), TABLE)
    run.uses(*steps.all())
    child = Model(
        kind="child",
        name=f"child-{plan.spec.name}",
        key=work.gkd,
        sources=(steps.answer.key, steps.library.key, steps.parent.key),
        headline=said,
        about={"uri": uri_of(context.store(), work.gkd), "store": context.runtime.store} | steps.descent,
        files=lambda: {TABLE: artifact_table(context.store(), keys), CARD: _card(steps, work, inputs, said)},
        curve=lambda: gkd_curve(record_of(GkdRecord, work.gkd, context)),
    )
    run.makes(child, _version(plan, child, numbers))


@_as_far_as_there
def record_report(plan: Plan, context: RunContext, run: TrackedRun, work: ReportWork) -> None:
    """The report and its figures, its headline as metrics, and where every artifact of the run lies."""
    headline = context.store().manifest(work.key).record["headline"]
    run.metrics([(name, value, 0) for name, value in headline.items()])
    run.artifacts(context.store().fetch(work.key), "report")
    timing = [work.timing.key] if work.timing else []
    run.text(artifact_table(context.store(), ancestors(context.store(), [work.key, *timing])), TABLE)
    run.reads(_texts(plan, context, "calibration", "bld", "gkd", "scoring", "evaluation"))


def record_export(uri: str, scratch: str, child: str, directory: Path, about: dict[str, Any], said: str) -> bool:
    """A run of its own whose input is a child and whose output is what was exported from it.

    Args:
        child: the key of the child.
        directory: the exported files.
        about: what is to be known of them.
        said: the same in a few words.

    Returns:
        Whether MLflow knows the child, without which nothing is noted.
    """
    files = {f.relative_to(directory).as_posix(): f for f in sorted(directory.rglob("*")) if f.is_file()}
    rows = [f"{name},{file.stat().st_size},{digest_file(file)}" for name, file in files.items()]
    table = "\n".join(["file,bytes,sha256", *rows, ""])

    def export(name: str) -> Model:
        return Model(
            kind="export",
            name=f"{name}-{about['format'].lower()}",
            key=f"export/{hashlib.sha256(table.encode()).hexdigest()[:40]}",
            sources=(child,),
            headline=said,
            about={"path": str(directory.resolve())} | about,
            files=lambda: {FILES: table},
        )

    return track_use(uri, child, f"export {directory.name}", scratch, export)


def _child_keys(plan: Plan, work: ReportWork) -> tuple[str, ...]:
    """Artifacts that only this child is made of and known by."""
    known_by = [plan.evaluate(key).key for key in (None, work.gkd)]
    timing = [work.timing.key] if work.timing else []
    return (plan.tokens("gkd").key, work.gkd, plan.tokens("evaluation").key, *known_by, *timing)


def _card(steps: Steps, work: ReportWork, inputs: Any, said: str) -> str:
    from puzzle_core.export.card import Provenance, child_card

    manifest = steps._store.manifest(work.gkd)
    provenance = Provenance.of_child(work.gkd, manifest, inputs.child.evaluation, inputs.parent.evaluation)
    return child_card(f"child-{work.spec.name}", said, inputs.child.architecture, provenance, steps.descent)


def _version(plan: Plan, child: Model, numbers: dict[str, float]) -> Version:
    spec, family = plan.spec, allowed_name(Path(plan.spec.parent.path).name)
    said = [child.headline, f"Answer for {spec.scenario.name} on {spec.target.name}, from specification {spec.name}."]
    said += [f"- {what}: `{key}`" for what, key in ({"artifact": child.key} | child.about).items()]
    tags = {"puzzle.parent": plan.inputs.parent, "puzzle.spec": spec.digest(), "puzzle.spec_name": spec.name}
    return Version(
        name=f"puzzle-{family}",
        family=f"Children of {spec.parent.path}. Aliases name a target and a scenario: the newest child for these.",
        alias=allowed_name(f"{spec.target.name}-{spec.scenario.name}"),
        description="\n".join(said),
        tags=tags | {f"puzzle.{name}": f"{value:.6g}" for name, value in numbers.items()},
    )


def _texts(plan: Plan, context: RunContext, *splits: str) -> list[Texts]:
    found = []
    for split in splits:
        work, data = plan.tokens(split), plan.spec.data
        sources = data.train_texts if work.texts == plan.inputs.train_texts else data.held_out_texts
        record = context.store().manifest(work.key).record
        found.append(
            Texts(
                name=f"{', '.join(Path(source).name for source in sources)} ({split})",
                split=split,
                digest=work.digest(),
                source={"texts": sources, "digest": work.texts, "uri": uri_of(context.store(), work.key)},
                profile={"windows": record["windows"], "tokens": record["tokens"]},
            )
        )
    return found
