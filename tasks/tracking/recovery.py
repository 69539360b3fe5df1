"""Words that a run leaves in scratch for the next one, where MLflow could not be told how it ended.

The functions take an `MlflowClient`; tasks/tracking/tracking.py has it, and calls them.
"""

import time
import uuid
from pathlib import Path
from typing import Any

from puzzle_core.records import Record

GAP_TAG, TOKEN_TAG, OUTERMOST_TAG = "puzzle.gap", "puzzle.token", "puzzle.outermost"


class PendingRunEnd(Record):
    """The end of an outermost run that MLflow could not be told of, and since when (epoch seconds)."""

    experiment: str
    token: str
    status: str
    ended_ms: int
    since_s: float


def left_place(scratch: str, uri: str) -> Path:
    """Where runs leave word of what the MLflow at this URI could not be told."""
    return Path(scratch) / "tracking" / uuid.uuid5(uuid.NAMESPACE_URL, uri).hex


def end_left(client: Any, file: Path) -> None:
    """End a run, and those within it, that ended while MLflow did not answer; drop the word that told of it.

    Raises:
        ArtifactError: the file is damaged.
    """
    left = PendingRunEnd.read(file)
    experiment = client.get_experiment_by_name(left.experiment)
    text = f"no answer after {moment(left.since_s)}: what came later is missing here; see the next run of this spec"
    for run in runs_tagged(client, experiment.experiment_id, OUTERMOST_TAG, left.token) if experiment else ():
        client.set_tag(run.info.run_id, GAP_TAG, text)
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, left.status, left.ended_ms)
    file.unlink(missing_ok=True)


def runs_tagged(client: Any, experiment: str, tag: str, value: str) -> list[Any]:
    """Runs with this tag, the first one first."""
    return list(client.search_runs([experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time"]))


def moment(seconds: float) -> str:
    """An epoch time as people read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
