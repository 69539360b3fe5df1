"""Prefect artifacts of a run, shown in its UI: cached results, the library, the architecture, the child, progress.

The UI shows artifacts of one key as versions of one artifact, so keys contain the name of the specification and, for a
search, the target and the scenario. They are views only: where the server does not take one, the run logs that and goes
on.
"""

import base64
import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from puzzle_core.plan import Plan
from puzzle_core.records import Work
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.work import BldRecord, ScoreRecord
from tasks.earlier_search import changes_since_last
from tasks.runtime.context import RunContext
from tasks.tracking.tracked_run import TrackedRun

log = logging.getLogger("puzzle")
MOST_ROWS = 2000
FRONTIER = "quality_against_speed"
MLFLOW_UI = "PUZZLE_MLFLOW_UI"
"""Environment variable with the address of MLflow's UI, for a tracking URI that is no address (`make up` sets it)."""
P = ParamSpec("P")


def _log_errors(show: Callable[P, None]) -> Callable[P, None]:
    """Log any error, and let the run go on."""

    @functools.wraps(show)
    def try_to_show(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            show(*args, **kwargs)
        except Exception as error:
            log.warning("Prefect did not take an artifact (%s), the run goes on: %s", show.__name__, error)

    return try_to_show


@_log_errors
def show_cached(stage: str, plan: Plan, works: Sequence[Work], context: RunContext) -> None:
    """Results that the store had already: what they are of, their keys, and which run made each when."""
    rows = []
    for work, manifest in zip(works, context.store().manifests(work.key for work in works).values(), strict=True):
        fields = work.model_dump(mode="json", include={"layer", "variant", "block", "span"})
        rows.append(fields | {"key": work.key, "made by": manifest.made_by, "made at": manifest.made_at})
    if rows:
        _table(f"found-{stage}-{plan.name}", rows, f"{stage}: {len(rows)} results were in the store")


@_log_errors
def show_library(plan: Plan, context: RunContext) -> None:
    """Every trained variant with its final loss, and every scored block with its KL."""
    store, about = context.store(), f"Block library of {plan.spec.parent.path}"
    trained = store.records(BldRecord, (work.key for work in plan.all_bld())).values()
    scored = store.records(ScoreRecord, (work.key for work in plan.all_scores())).values()
    rows = []
    for bld in trained:
        losses = {"initial loss": bld.initial_loss, "final loss": bld.final_loss}
        rows.append({"layer": bld.layer, "variant": str(bld.variant)} | losses | {"seconds": round(bld.seconds, 2)})
    _table(f"library-{plan.name}", rows, f"{about}: normalised MSE before and after BLD")
    rows = []
    for score in scored:
        kl, agreement = score.kl_nats_per_token, score.top1_agreement
        row = {"layer": score.layer, "block": str(score.option), "KL, nats per token": kl}
        rows.append(row if agreement is None else row | {"agreement": agreement})
    made = "" if plan.spec.scoring.method == "exact" else ", estimated from gradients"
    _table(f"scores-{plan.name}", rows, f"{about}: what each block costs, alone in the parent{made}")


@_log_errors
def show_architecture(plan: Plan, context: RunContext, key: str) -> None:
    """The chosen architecture, with its limits, what changed since the last search for the target, and baselines."""
    from puzzle_core.report.search_text import answer_text, explanation_text

    record = context.store().record(SearchRecord, key)
    changes = changes_since_last(context.store(), key)
    if changes:
        log.info("%s", changes)
    answer = "\n\n".join(filter(None, [answer_text(record), changes, explanation_text(record)]))
    spec = plan.spec
    create_markdown_artifact(
        f"```text\n{answer}\n```\n\nArtifact `{key}`\n",
        key=_name(f"architecture-{spec.name}-{spec.target.name}-{spec.scenario.name}"),
        description=f"Architecture for {spec.scenario.name} on {spec.target.name}",
    )


@_log_errors
def show_report(plan: Plan, context: RunContext, key: str) -> None:
    """The child beside its parent, and the figure of quality against speed."""
    from puzzle_core.report.report import CAPTIONS
    from puzzle_core.report.report_inputs import ReportInputs
    from puzzle_core.report.report_tables import format_final_table

    directory, name = context.store().fetch(key), plan.spec.name
    table = format_final_table(ReportInputs.read(directory / "report.json"))
    text = f"```text\n{table}\n```\n\nArtifact `{key}`\n"
    create_markdown_artifact(text, key=_name(f"child-{name}"), description="The child beside its parent")
    picture = directory / "figures" / f"{FRONTIER}.png"
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        address = f"data:image/png;base64,{data}"
        create_image_artifact(address, key=_name(f"frontier-{name}"), description=CAPTIONS[FRONTIER])


@_log_errors
def show_tracked(plan: Plan, run: TrackedRun) -> None:
    """The address of this run in MLflow."""
    if run.run_id is None:
        return
    key, about = _name(f"mlflow-{plan.spec.name}"), "This run in MLflow"
    address = run.uri if run.uri.startswith("http") else os.environ.get(MLFLOW_UI)
    if address:
        link = f"{address.rstrip('/')}/#/experiments/{run.experiment_id()}/runs/{run.run_id}"
        create_link_artifact(link, key=key, link_text=f"MLflow run {run.run_id}", description=about)
    else:
        text = f"Run `{run.run_id}`; `mlflow ui --backend-store-uri {run.uri}` shows it.\n"
        create_markdown_artifact(text, key=key, description=about)


class ProgressArtifact:
    """The progress of a long stage, as a Prefect artifact of the present run, created when it is first shown."""

    def __init__(self, stage: str, name: str) -> None:
        """A progress artifact that does not exist yet.

        Args:
            stage: what progresses.
            name: of what it is the progress, for instance the specification.
        """
        self._key, self._title = _name(f"progress-{stage}-{name}"), f"{stage} of {name}"
        self._artifact: UUID | None = None

    @property
    def exists(self) -> bool:
        """Whether it was shown."""
        return self._artifact is not None

    @_log_errors
    def show(self, percent: float, text: str) -> None:
        """Show how far the stage is, with a text."""
        description = f"{self._title}: {text}"
        if self._artifact is None:
            created = create_progress_artifact(percent, key=self._key, description=description)
            self._artifact = cast(UUID, created)  # the call is synchronous here
        else:
            update_progress_artifact(self._artifact, percent, description=description)


# `Any`: a cell may be whatever Prefect writes as JSON.
def _table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """Create a table artifact of at most MOST_ROWS rows."""
    if len(rows) > MOST_ROWS:
        description += f" (the first {MOST_ROWS} of {len(rows)})"
    create_table_artifact(rows[:MOST_ROWS], key=_name(key), description=description)


def _name(text: str) -> str:
    """A key in the form that Prefect takes: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
