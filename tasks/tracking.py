"""MLflow: runs, metrics, and the lineage from parent to child. The only file that imports mlflow.

One MLflow run per flow run, nested as the flows are. The parent, the library, the architecture and the child are
logged models that carry the key of their artifact; a run has as inputs the models it used and as outputs those it made,
so from a child one gets back to everything it came from. Only `MlflowClient` is used: the fluent API is not safe in
threads and makes stray runs. If tracking fails the run goes on and says so.
"""

import contextlib
import contextvars
import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default is 7: four minutes for every lost call

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, LoggedModelOutput, Metric, Param
from mlflow.exceptions import MlflowException
from prefect.runtime import flow_run

from puzzle_core.records import Record, canonical_json
from puzzle_core.spec import RunSpec
from tasks.process import is_gone, this_process

log = logging.getLogger("puzzle")
KEY_TAG = "puzzle.key"
PROCESS_TAG = "puzzle.process"


class TrackedRun(Record):
    """An MLflow run that may be written to from any task; does nothing when tracking failed to start it."""

    uri: str
    experiment: str
    run_id: str | None

    def metrics(self, values: list[tuple[str, float, int]]) -> None:
        """Log (name, value, step) now, as many at a time as MLflow takes."""
        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), 1000):
            part = metrics[start : start + 1000]
            self._try(lambda client, run, part=part: client.log_batch(run, metrics=part))

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; those that do not fit are cut."""
        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        self._try(lambda client, run: client.log_batch(run, params=params))

    def artifacts(self, directory: Path, place: str) -> None:
        """Upload a directory of small files."""
        self._try(lambda client, run: client.log_artifacts(run, str(directory), place))

    def uses(self, *models: str | None) -> None:
        """Note models, by id, as inputs of this run."""
        inputs = [LoggedModelInput(model) for model in models if model]
        if inputs:
            self._try(lambda client, run: client.log_inputs(run, models=inputs))

    def makes(self, kind: str, name: str, key: str, about: dict[str, Any]) -> str | None:
        """Note the model with this artifact key as an output of this run; found again if it was logged before.

        Returns:
            The id of the logged model.
        """

        def note(client: MlflowClient, run: str) -> str:
            experiment = client.get_run(run).info.experiment_id
            found = client.search_logged_models([experiment], filter_string=f"tags.`{KEY_TAG}` = '{key}'")
            if found:
                model = found[0]
            else:
                params = {name: str(value)[:500] for name, value in ({"key": key} | about).items()}
                model = client.create_logged_model(
                    experiment, name, source_run_id=run, tags={KEY_TAG: key}, params=params, model_type=kind
                )
                client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
            return str(model.model_id)

        result: str | None = self._try(note)
        return result

    def experiment_id(self) -> str | None:
        """The id that MLflow's addresses have for the experiment of this run."""
        found: str | None = self._try(lambda client, run: client.get_run(run).info.experiment_id)
        return found

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._try(lambda client, run: client.set_terminated(run, status))

    def _try(self, act: Callable[..., Any]) -> Any:
        if self.run_id is None:
            return None
        try:
            return act(_client(self.uri), self.run_id)
        except (MlflowException, OSError) as error:
            log.warning("MLflow at %s did not take a record, the run goes on without: %s", self.uri, error)
            return None


def _allowed(name: str) -> str:
    """MLflow takes no ':' or '+' in the names of metrics."""
    return name.replace(":", "-").replace("+", " ")


_current: contextvars.ContextVar[TrackedRun | None] = contextvars.ContextVar("tracked_run", default=None)


@contextlib.contextmanager
def tracked(name: str, spec: RunSpec) -> Iterator[TrackedRun]:
    """An MLflow run for the flow run at hand, nested in the one around it."""
    run = _start(name, spec, _current.get())
    token = _current.set(run)
    try:
        yield run
    except BaseException as error:
        run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    else:
        run.end("FINISHED")
    finally:
        _current.reset(token)


def _start(name: str, spec: RunSpec, around: TrackedRun | None) -> TrackedRun:
    uri, experiment = spec.runtime.mlflow_uri, spec.runtime.mlflow_experiment
    if around and around.run_id is None:
        return around
    tags = {
        "mlflow.runName": name,
        PROCESS_TAG: this_process(),
        "prefect.flow_run_id": str(flow_run.get_id()),
        "prefect.flow_run_url": str(flow_run.get_flow_run_ui_url()),
    }
    if around:
        tags["mlflow.parentRunId"] = around.run_id
    try:
        client = _client(uri)
        if not around:
            _bury_runs(client)
        started = client.create_run(_experiment_id(client, uri, experiment), tags=tags, run_name=name)
    except (MlflowException, OSError) as error:
        log.warning("MLflow at %s cannot be reached, the run goes on without it: %s", uri, error)
        return TrackedRun(uri=uri, experiment=experiment, run_id=None)
    run = TrackedRun(uri=uri, experiment=experiment, run_id=started.info.run_id)
    run.params({"spec_digest": spec.digest(), "parent": spec.parent.path, "target": spec.target.name})
    if not around:
        run.params(_flat(spec.model_dump(mode="json", exclude={"runtime"})))
    return run


def bury_runs(uri: str) -> None:
    """Close runs as KILLED whose process, one of this machine, has ended without closing them."""
    try:
        _bury_runs(_client(uri))
    except (MlflowException, OSError) as error:
        log.warning("MLflow at %s was not asked for runs whose process is gone: %s", uri, error)


def _bury_runs(client: MlflowClient) -> None:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
        for run in page:
            if is_gone(run.data.tags.get(PROCESS_TAG, "")):
                client.set_terminated(run.info.run_id, "KILLED")
        token = page.token
        if not token:
            return


@functools.lru_cache(maxsize=4)
def _client(uri: str) -> MlflowClient:
    if uri.startswith("sqlite:///"):
        _make_database(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(file: Path) -> None:
    """Have a whole database or none, however many commands start at once, and whenever one of them is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        return
    with file.with_name(f".{file.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            fresh = file.with_name(f".{file.name}.new")
            fresh.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{fresh}", f"sqlite:///{fresh}").search_experiments()
            fresh.rename(file)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    place = None
    if uri.startswith("sqlite:///"):
        place = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException:  # another run that started at the same moment may have made it
        found = client.get_experiment_by_name(name)
        if not found:
            raise
        return str(found.experiment_id)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = canonical_json(value) if isinstance(value, list) else value
    return flat
