"""What each flow logs to MLflow: metrics of its stage, the texts that it read, and the models that it used and made.

Everything is logged from manifests and not from inside a cached task, so a run that finds its work in the store has the
same lineage. Every step from the parent to the child is a logged model (tasks/tracking/lineage_steps.py).
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec

from puzzle_core.errors import ArtifactError, DamagedError
from puzzle_core.plan import Plan
from puzzle_core.records import Work, digest_file
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.usage_table import HOUR_S, total
from puzzle_core.search.search_record import RefineRecord, SearchRecord
from puzzle_core.work import BldRecord, GkdRecord, ReportWork, ScoreRecord, TokensRecord
from tasks.runtime.context import RunContext
from tasks.store.references import ancestors, read_keys
from tasks.store.stage_usage import usage_by_stage
from tasks.tracking.lineage_steps import (
    TABLE,
    Steps,
    artifact_table,
    bld_curve,
    child_name,
    gkd_curve,
    uri_of,
)
from tasks.tracking.loadable import Checkpoint
from tasks.tracking.tracked_models import TrackedModel, Version, alias_of, allowed_name
from tasks.tracking.tracked_run import TextsInput, TrackedRun
from tasks.tracking.tracking import current_run, track_use

log = logging.getLogger("puzzle")
P = ParamSpec("P")
CARD, FILES = "README.md", "files.csv"


def _tolerate_missing(note: Callable[P, None]) -> Callable[P, None]:
    """Log a warning where the store lacks an artifact that only lineage reads; the run itself is complete."""

    @functools.wraps(note)
    def try_to_note(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            note(*args, **kwargs)
        except ArtifactError as error:
            if isinstance(error, DamagedError):
                raise
            log.warning("the lineage of this run in MLflow is incomplete: %s", error)

    return try_to_note


def record_trained(works: Iterable[Work], context: RunContext) -> None:
    """Log the loss curves of variants that this process has just trained, in the innermost open run."""
    run, store = current_run(), context.store()
    if run:
        run.metrics([point for work in works for point in bld_curve(store.record(BldRecord, work.key))])


@_tolerate_missing
def record_library(plan: Plan, context: RunContext, run: TrackedRun) -> None:
    """Log final BLD losses and KL by layer; the run uses the parent and makes the library and the scores."""
    steps, store, metrics = Steps(plan, context), context.store(), []
    store.pack((*steps.bld, *steps.scored))  # for the reads below and those of later runs
    for trained in store.records(BldRecord, steps.bld).values():
        metrics.append((f"bld_loss/{trained.variant}", trained.final_loss, trained.layer))
    for scored in store.records(ScoreRecord, steps.scored).values():
        metrics.append((f"kl/{scored.option}", scored.kl_nats_per_token, scored.layer))
    run.metrics(metrics)
    run.reads(_texts(plan, context, "calibration", "bld", *plan.scoring_splits))
    run.text(artifact_table(store, (*steps.library_keys, *steps.score_keys)), TABLE)
    run.uses(steps.parent)
    run.makes(steps.library)
    run.makes(steps.scores)


@_tolerate_missing
def record_architecture(plan: Plan, context: RunContext, run: TrackedRun, key: str) -> None:
    """Log the chosen architecture's figures; the run makes the costs and the architecture."""
    steps, chosen = Steps(plan, context), context.store().record(SearchRecord, key).best
    run.metrics([("score", chosen.score, 0), ("gap", chosen.gap, 0), ("batch_size", chosen.prediction.batch_size, 0)])
    shares = {f"limit/{limit.scenario}/{limit.name}": limit.share for limit in chosen.limits}
    run.metrics([(name, share, 0) for name, share in shares.items() if share is not None])
    run.text(artifact_table(context.store(), (*steps.cost_keys, key)), TABLE)
    run.uses(steps.parent, steps.library, steps.scores)
    run.makes(steps.costs)
    run.makes(steps.architecture)


@_tolerate_missing
def record_refined(plan: Plan, context: RunContext, run: TrackedRun, record: RefineRecord) -> None:
    """Log predicted and measured KL of every candidate, in their order; the run makes the best architecture."""
    for step, candidate in enumerate(record.candidates):
        run.metrics([("kl_predicted", candidate.solution.score, step), ("kl_measured", candidate.measured_kl, step)])
    steps = Steps(plan, context)
    run.uses(steps.library, steps.architecture)
    run.makes(steps.answer)


@_tolerate_missing
def record_child(plan: Plan, context: RunContext, run: TrackedRun, work: ReportWork) -> None:
    """Log the child's quality; the run makes the child, which becomes a registered version if it is the run's answer.

    Args:
        plan: of the run.
        context: its places.
        run: where to log.
        work: the report of the run, which names all artifacts that describe the child.
    """
    from puzzle_core.report import collect, derived, report
    from puzzle_core.report.gate import unmet

    steps = Steps(plan, context)
    inputs = collect.collect(work, lambda key: context.store().manifest(key).record, plan.spec.parent.path)
    numbers, headline = derived.headline(inputs), report.headline_sentence(inputs)
    quality, gate = inputs.child.evaluation, plan.spec.champion
    results = {"perplexity": quality.perplexity, "top1_accuracy": quality.top1_accuracy} | numbers
    results |= _benchmarks(inputs)
    reasons = unmet(inputs, gate) if gate else ["the specification has no gate"]
    if gate and plan.is_last:
        log.info("the child is %s", f"no champion: {'; '.join(reasons)}" if reasons else "the champion of its scenario")
    keys, trainings = _child_keys(plan, work), dict(zip(plan.gkd_splits, work.trainings, strict=True))
    *read, evaluated = _texts(plan, context, *plan.gkd_splits, "evaluation")
    run.reads([*read, evaluated])
    run.text(artifact_table(context.store(), keys), TABLE)
    run.uses(*steps.all())
    child = TrackedModel(
        kind="child",
        name=child_name(plan.spec.name, None if plan.is_last else plan.round),
        key=work.gkd,
        sources=tuple(dict.fromkeys((steps.answer.key, steps.library.key, steps.parent.key, steps.first_parent.key))),
        headline=headline,
        about={"uri": uri_of(context.store(), work.gkd), "store": context.runtime.store} | steps.descent,
        files=lambda: {TABLE: artifact_table(context.store(), keys), CARD: _card(steps, work, inputs, context)},
        curve=lambda: [
            point
            for split, key in trainings.items()
            for point in gkd_curve(split, context.store().record(GkdRecord, key))
        ],
        checkpoint=Checkpoint(context.store(), work.gkd),
        results=results,
    )
    version = _version(plan, child, numbers, is_champion=not reasons) if plan.is_last else None
    run.makes(child, version, evaluated)


@_tolerate_missing
def record_report(plan: Plan, context: RunContext, run: TrackedRun, work: ReportWork) -> None:
    """Log the report and its figures, its headline as metrics, and a table of all artifacts of the run."""
    headline = context.store().manifest(work.key).record["headline"]
    run.metrics([(name, value, 0) for name, value in headline.items()])
    artifacts = ancestors(context.store(), [work.key, *read_keys(work)])
    took = usage_by_stage(context.store(), artifacts)
    for stage in (*took, total(took)):
        hours = {"core_hours": stage.core_seconds / HOUR_S, "gpu_hours": stage.gpu_seconds / HOUR_S}
        figures = hours | {"bytes": float(stage.size_bytes)}
        run.metrics([(f"cost/{stage.stage}/{name}", value, 0) for name, value in figures.items()])
    if (budget := context.runtime.budget) and budget.price_per_hour:
        whole = total(took)
        run.metrics([("cost/all/price", (whole.gpu_seconds or whole.core_seconds) / HOUR_S * budget.price_per_hour, 0)])
    run.artifacts(context.store().fetch(work.key), "report")
    run.text(artifact_table(context.store(), artifacts), TABLE)
    run.reads(_texts(plan, context, *plan.splits))


def record_export(uri: str, scratch: str, child: str, directory: Path, about: dict[str, object], headline: str) -> bool:
    """Log a run that uses a child and makes an export.

    Args:
        uri: MLflow's tracking URI.
        scratch: where the end of the run is left if MLflow does not receive it.
        child: the key of the child.
        directory: the exported files.
        about: parameters of the export; `format` names the kind.
        headline: the export in a few words.

    Returns:
        Whether MLflow knows the child; nothing is logged if it does not.
    """
    files = {f.relative_to(directory).as_posix(): f for f in sorted(directory.rglob("*")) if f.is_file()}
    rows = [f"{name},{file.stat().st_size},{digest_file(file)}" for name, file in files.items()]
    table = "\n".join(["file,bytes,sha256", *rows, ""])

    def export(name: str) -> TrackedModel:
        return TrackedModel(
            kind="export",
            name=f"{name}-{str(about['format']).lower()}",
            key=f"export/{hashlib.sha256(table.encode()).hexdigest()[:40]}",
            sources=(child,),
            headline=headline,
            about={"path": str(directory.resolve())} | about,
            files=lambda: {FILES: table},
        )

    return track_use(uri, child, f"export {directory.name}", scratch, export)


def _benchmarks(inputs: ReportInputs) -> dict[str, float]:
    """The child's accuracies and what it keeps of its parent's, by names that MLflow takes."""
    from puzzle_core.report.accuracies import accuracies, kept

    named = {f"{a.benchmark}/{a.metric}": a.value for a in accuracies(inputs.child)}
    shares = kept(inputs.parent, inputs.child)
    named |= {f"{benchmark}/{metric} kept": share for (benchmark, metric), share in shares.items()}
    return {"/".join(map(allowed_name, name.split("/", 1))): value for name, value in named.items()}


def _child_keys(plan: Plan, work: ReportWork) -> tuple[str, ...]:
    """Artifacts of this child alone: its training, its evaluation and its timing."""
    evaluations = [plan.evaluate(key).key for key in (None, work.gkd)]
    timing = [work.timing.key] if work.timing else []
    tokens = [plan.tokens(split).key for split in (*plan.gkd_splits, "evaluation")]
    return (*tokens[:-1], *work.trainings, tokens[-1], *evaluations, *timing)


def _card(steps: Steps, work: ReportWork, inputs: ReportInputs, context: RunContext) -> str:
    """The child's model card, as Markdown."""
    from puzzle_core.export.card import child_card  # slow to import
    from puzzle_core.report import report
    from tasks.store.provenance import child_provenance

    child, headline = inputs.child, report.headline_sentence(inputs)
    provenance = child_provenance(context.store(), work.gkd, child.evaluation, inputs.parent.evaluation)
    return child_card(f"child-{work.spec.name}", headline, child.architecture, provenance, steps.descent)


def _version(plan: Plan, child: TrackedModel, numbers: dict[str, float], is_champion: bool) -> Version:
    """The registered version of a child; its alias names target and scenario."""
    spec, family = plan.spec, allowed_name(Path(plan.spec.parent.path).name)
    lines = [child.headline, f"Answer for {spec.scenario.name} on {spec.target.name}, from specification {spec.name}."]
    lines += [f"- {what}: `{key}`" for what, key in ({"artifact": child.key} | dict(child.about)).items()]
    tags = {"puzzle.parent": plan.inputs.first.parent, "puzzle.spec": spec.digest(), "puzzle.spec_name": spec.name}
    return Version(
        name=f"puzzle-{family}",
        about_name=f"Children of {spec.parent.path}. Aliases: TARGET-SCENARIO and candidate are the newest child, "
        "champion-TARGET-SCENARIO and champion the one that was promoted last.",
        alias=alias_of(spec.target.name, spec.scenario.name),
        description="\n".join(lines),
        tags=tags | {f"puzzle.{name}": f"{value:.6g}" for name, value in numbers.items()},
        is_champion=is_champion,
    )


def _texts(plan: Plan, context: RunContext, *splits: str) -> list[TextsInput]:
    """The token splits, as inputs of a run."""
    texts = []
    for split in splits:
        work, sources = plan.tokens(split), plan.texts(split).sources
        record = context.store().record(TokensRecord, work.key)
        texts.append(
            TextsInput(
                name=f"{', '.join(Path(source).name for source in sources)} ({split})",
                split=split,
                digest=work.digest(),
                source={"texts": sources, "digest": work.texts, "uri": uri_of(context.store(), work.key)},
                profile={"windows": record.windows, "tokens": record.tokens},
            )
        )
    return texts
