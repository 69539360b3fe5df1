"""MLflow clients: one per tracking URI, with a database that is complete however many processes create it at once.

Only `MlflowClient` is used: MLflow's fluent API is not safe in threads and starts runs of its own.
"""

import contextlib
import fcntl
import functools
import logging
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.utils import _get_latest_schema_revision

from tasks.runtime.private_files import private_directory
from tasks.runtime.process import is_gone

log = logging.getLogger("puzzle")
ARTIFACTS = "mlartifacts"
"""The directory of MLflow's artifacts, beside its database."""
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's database names artifacts: tables and columns."""
PROCESS_TAG = "puzzle.process"
"""Tag of a run: the process that writes to it, as `this_process` names it."""


@functools.lru_cache(maxsize=4)
def mlflow_client(uri: str) -> MlflowClient:
    """The client of a tracking URI; a SQLite database is created where there is none."""
    if uri.startswith("sqlite:///"):
        _prepare_database(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_ids(client: MlflowClient) -> list[str]:
    """The ids of all experiments."""
    return [str(experiment.experiment_id) for experiment in client.search_experiments()]


def ensure_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment of this name, which is created where there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / ARTIFACTS).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # a run that started at the same moment may have created it
        experiment = client.get_experiment_by_name(name)
        if not experiment:
            raise
        return str(experiment.experiment_id)


def runs_tagged(client: MlflowClient, experiment: str, tag: str, value: str) -> list[Run]:
    """The runs of an experiment with this tag, the oldest first."""
    return list(client.search_runs([experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time"]))


def model_text(uri: str, model: LoggedModel, name: str) -> str | None:
    """The content of a text file of a logged model; none where there is none or it cannot be read."""
    with contextlib.suppress(MlflowException, OSError), tempfile.TemporaryDirectory() as directory:
        repository = get_artifact_repository(model.artifact_location, tracking_uri=uri)
        return Path(repository.download_artifacts(name, directory)).read_text()  # type: ignore[no-untyped-call]
    return None


def end_orphaned_runs(uri: str) -> None:
    """End runs as KILLED whose process ran on this machine and has ended; log where MLflow does not answer."""
    try:
        kill_orphaned_runs(mlflow_client(uri))
    except (MlflowException, OSError) as error:
        log.warning("MLflow at %s was not searched for runs of ended processes: %s", uri, error)


def kill_orphaned_runs(client: MlflowClient) -> None:
    """End runs as KILLED whose process ran on this machine and has ended.

    Raises:
        MlflowException: MLflow does not answer.
    """
    experiments, token = experiment_ids(client), None
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
        for run in page:
            if is_gone(run.data.tags.get(PROCESS_TAG, "")):
                client.set_terminated(run.info.run_id, "KILLED")
        token = page.token
        if not token:
            return


def _prepare_database(file: Path) -> None:
    """Create the database, or upgrade one of an older MLflow; one process at a time, and whole if it is killed.

    A new database is made under another name and renamed: a killed process leaves none, not a part of one.

    Raises:
        MlflowException: the database is of a newer MLflow.
    """
    private_directory(file.parent)
    with file.with_name(f".{file.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            _upgrade_database(file)
            _follow_artifacts(file)
        else:
            new = file.with_name(f".{file.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}", f"sqlite:///{new}").search_experiments()
            new.rename(file)


def _follow_artifacts(file: Path) -> None:
    """Have a database that was moved find its artifacts beside it: it names them by absolute URIs."""
    directory = file.resolve().parent / ARTIFACTS
    if not directory.is_dir():
        return
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        try:
            locations = {location for (location,) in database.execute("SELECT artifact_location FROM experiments")}
        except sqlite3.Error:
            return  # no database of MLflow's: MLflow says what is wrong when it opens it
        for before in locations - {directory.as_uri(), None}:
            parts = urlparse(before)
            if (
                parts.scheme == "file"
                and parts.path.endswith(f"/{ARTIFACTS}")
                and not Path(unquote(parts.path)).exists()
            ):
                for table, column in PLACES:
                    database.execute(
                        f"UPDATE {table} SET {column} = :now || substr({column}, :length + 1) "
                        f"WHERE {column} = :before OR substr({column}, 1, :length + 1) = :before || '/'",
                        {"now": directory.as_uri(), "before": before, "length": len(before)},
                    )
                log.info("the artifacts of %s are in %s now, and were in %s", file, directory, before)


def _upgrade_database(file: Path) -> None:
    """Migrate the database of an older MLflow, which MLflow refuses to open; a copy from before stays beside it."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        try:
            [(revision,)] = database.execute("SELECT version_num FROM alembic_version").fetchall()
        except (sqlite3.Error, ValueError):
            return  # no database of MLflow's: MLflow says what is wrong when it opens it
        if revision == _get_latest_schema_revision():  # type: ignore[no-untyped-call]
            return
        copy = file.with_name(f"{file.name}.{revision}")
        if not copy.exists():
            partial = copy.with_name(f".{copy.name}")
            with contextlib.closing(sqlite3.connect(partial)) as target:
                database.backup(target)
            partial.rename(copy)
    log.info("%s is of another version of MLflow: it is upgraded now, and the copy from before is %s", file, copy)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise MlflowException(f"{file} cannot be upgraded; is it of a newer MLflow than {mlflow.__version__}? {reason}")
