"""Run ends that MLflow did not receive: a run leaves them as files in scratch, and the next run delivers them."""

import time
import uuid
from pathlib import Path

from mlflow import MlflowClient

from puzzle_core.records import Record
from tasks.tracking.mlflow_client import runs_tagged

GAP_TAG, OUTERMOST_TAG = "puzzle.gap", "puzzle.outermost"


class PendingRunEnd(Record):
    """The end of a flow's outermost run that MLflow did not receive, and since when it has not answered (epoch s)."""

    experiment: str
    token: str
    status: str
    ended_ms: int
    since_s: float


def pending_directory(scratch: str, uri: str) -> Path:
    """Where runs leave the ends that the MLflow at this URI did not receive."""
    return Path(scratch) / "tracking" / uuid.uuid5(uuid.NAMESPACE_URL, uri).hex


def deliver_run_end(client: MlflowClient, file: Path) -> None:
    """End the run of this file and the runs nested in it, and remove the file.

    Raises:
        ArtifactError: the file is damaged.
    """
    pending = PendingRunEnd.read(file)
    experiment = client.get_experiment_by_name(pending.experiment)
    text = (
        f"no answer after {time_text(pending.since_s)}: what came later is missing here; see the next run of this spec"
    )
    runs = runs_tagged(client, experiment.experiment_id, OUTERMOST_TAG, pending.token) if experiment else []
    for run in runs:
        client.set_tag(run.info.run_id, GAP_TAG, text)
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, pending.status, pending.ended_ms)
    file.unlink(missing_ok=True)


def time_text(seconds: float) -> str:
    """An epoch time as text, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
