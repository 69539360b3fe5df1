"""MLflow: runs, metrics, and the lineage from parent to child. The only file that imports mlflow.

One MLflow run per flow run, nested as the flows are. The steps from a parent to exported files are logged models that
carry the key of their artifact (tasks/tracking/tracked_models.py); a run has as inputs the models and texts it used
and as
outputs the models it made. Only `MlflowClient` is used: the fluent API is not safe in threads and makes stray runs.


No run waits for MLflow (tasks/tracking/outbox.py). Where it does not answer the run goes on and says so, and what was
to be
recorded follows when it answers again, with a mark of the gap; what could not follow before the end of the process is
told to the next run by a word left in scratch, and lineage is noted from manifests, so that run makes it whole.
"""

import contextlib
import contextvars
import fcntl
import functools
import logging
import os
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the outbox tries again; the default is four minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")  # seconds; the default is 120
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from prefect.runtime import flow_run

from puzzle_core.records import Record, canonical_json
from puzzle_core.spec import RunSpec
from tasks.runtime.process import is_gone, this_process
from tasks.tracking.outbox import Gap, Outbox
from tasks.tracking.recovery import (
    GAP_TAG,
    OUTERMOST_TAG,
    TOKEN_TAG,
    PendingRunEnd,
    end_left,
    left_place,
    moment,
    runs_tagged,
)
from tasks.tracking.tracked_models import (
    Model,
    Values,
    Version,
    complete_model,
    find_model,
    link_models,
    note_model,
    register,
)

log = logging.getLogger("puzzle")
logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # the outbox says what is wrong with the server
MOST_METRICS, MOST_PARAMS = 1000, 100  # at a time, as MLflow takes them
PROCESS_TAG = "puzzle.process"


class Ids(NamedTuple):
    """What MLflow calls a run and its experiment."""

    run: str
    experiment: str


class Texts(NamedTuple):
    """Tokens that a run reads: whose, for what, their digest, and where they lie."""

    name: str
    split: str
    digest: str
    source: dict[str, Any]
    profile: dict[str, Any]


_known: dict[str, Ids] = {}
_gaps: defaultdict[str, list[str]] = defaultdict(list)
_monitors: dict[str, SystemMetricsMonitor] = {}


class TrackedRun(Record):
    """An MLflow run that may be written to from any task; what it is given is sent in order, and later if need be.

    `token` is its name in this process, where MLflow may not have given it an id yet, and `outermost` that of the run
    which it is part of, or its own.
    """

    uri: str
    experiment: str
    run_id: str | None
    token: str
    outermost: str
    scratch: str

    def metrics(self, values: Values) -> None:
        """Log (name, value, step), as many at a time as MLflow takes."""
        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), MOST_METRICS):
            part = metrics[start : start + MOST_METRICS]
            self._note(lambda client, ids, part=part: client.log_batch(ids.run, metrics=part))

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; those that do not fit are cut."""
        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        for start in range(0, len(params), MOST_PARAMS):
            part = params[start : start + MOST_PARAMS]
            self._note(lambda client, ids, part=part: client.log_batch(ids.run, params=part))

    def artifacts(self, directory: Path, place: str) -> None:
        """Upload a directory of small files."""
        self._note(lambda client, ids: client.log_artifacts(ids.run, str(directory), place))

    def text(self, text: str, name: str) -> None:
        """Upload a text as a file."""
        self._note(lambda client, ids: client.log_text(ids.run, text, name))

    def reads(self, texts: list[Texts]) -> None:
        """Note texts as datasets that this run used."""
        datasets = [
            DatasetInput(
                Dataset(
                    found.name[:500], found.digest[:36], "artifact store", canonical_json(found.source),
                    profile=canonical_json(found.profile),
                ),
                [InputTag("mlflow.data.context", found.split)],
            )
            for found in texts
        ]  # fmt: skip
        self._note(lambda client, ids: client.log_inputs(ids.run, datasets=datasets))

    def uses(self, *models: Model) -> None:
        """Note models as inputs of this run; one that MLflow does not know is logged as found, and made by no run."""

        def note(client: MlflowClient, ids: Ids) -> None:
            found = [note_model(client, ids.experiment, model, None) for model in models]
            inputs = client.get_run(ids.run).inputs  # MLflow refuses to hear of one twice
            known = {there.model_id for there in inputs.model_inputs} if inputs else set()
            if new := [LoggedModelInput(model.model_id) for model in found if model.model_id not in known]:
                client.log_inputs(ids.run, models=new)
            for model, logged in zip(models, found, strict=True):
                complete_model(client, model, logged, self._complete(client, ids))

        self._note(note)

    def _use_logged(self, model_id: str) -> None:
        self._note(lambda client, ids: client.log_inputs(ids.run, models=[LoggedModelInput(model_id)]))

    def makes(self, model: Model, version: Version | None = None) -> None:
        """Note a model as an output of this run, and as a registered version where one is given."""

        def note(client: MlflowClient, ids: Ids) -> None:
            made = note_model(client, ids.experiment, model, ids.run)
            outputs = client.get_run(ids.run).outputs
            if made.model_id not in {there.model_id for there in (outputs.model_outputs if outputs else ())}:
                client.log_outputs(ids.run, [LoggedModelOutput(made.model_id, step=0)])
            if version:
                register(client, made, version, ids.run)
            complete_model(client, model, made, self._complete(client, ids))

        self._note(note)

    def experiment_id(self) -> str | None:
        """The id that MLflow's addresses have for the experiment of this run."""
        return _known[self.token].experiment if self.token in _known else None

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED; the outermost one waits until all is recorded, or says what is
        not."""
        ended_ms, box = int(time.time() * 1000), _outbox(self.uri)
        if self.token == self.outermost:
            self._note(lambda client, ids: link_models(client, ids.experiment))
            self._note(lambda client, ids: _monitors.pop(self.token).finish() if self.token in _monitors else None)
        self._note(lambda client, ids: self._end(client, ids, status, ended_ms))
        if self.token == self.outermost and not box.flush():
            since_s, waiting = box.down_since_s or time.time(), box.drop(self.outermost)
            log.warning(
                "%d records of this run are not in MLflow at %s: run it again once that answers, which computes "
                "nothing and notes what is in the store",
                waiting,
                box.where,
            )
            left = PendingRunEnd(
                experiment=self.experiment, token=self.token, status=status, ended_ms=ended_ms, since_s=since_s
            )
            try:
                left.write(left_place(self.scratch, self.uri) / f"{self.token}.json")
            except OSError as error:
                log.warning("and no word of it could be left for the next run: %s", error)

    def _end(self, client: MlflowClient, ids: Ids, status: str, ended_ms: int) -> None:
        client.set_terminated(ids.run, status, ended_ms)
        for other in runs_tagged(client, ids.experiment, TOKEN_TAG, self.token):
            if other.info.run_id != ids.run:  # made by a call to start it whose answer was lost
                client.delete_run(other.info.run_id)

    def _complete(self, client: MlflowClient, ids: Ids) -> Callable[[Values], None]:
        """Logs those points of a curve that this run does not have."""

        def complete(values: Values) -> None:
            there = client.get_run(ids.run).data.metrics.keys() & {_allowed(name) for name, _, _ in values}
            known = {(name, metric.step) for name in there for metric in client.get_metric_history(ids.run, name)}
            now = int(time.time() * 1000)
            missing = [(_allowed(name), value, step) for name, value, step in values]
            metrics = [Metric(name, value, now, step) for name, value, step in missing if (name, step) not in known]
            for start in range(0, len(metrics), MOST_METRICS):
                client.log_batch(ids.run, metrics=metrics[start : start + MOST_METRICS])

        return complete

    def _note(self, act: Callable[[MlflowClient, Ids], Any]) -> None:
        def send() -> None:
            ids = _known.get(self.token)
            if ids is None and self.run_id:  # this is another process than the one that started the run
                ids = Ids(self.run_id, _client(self.uri).get_run(self.run_id).info.experiment_id)
                _known[self.token] = ids
            if ids:
                act(_client(self.uri), ids)

        _outbox(self.uri).put(self.outermost, send)


def _allowed(name: str) -> str:
    """MLflow takes no ':' or '+' in the names of metrics."""
    return name.replace(":", "-").replace("+", " ")


_current: contextvars.ContextVar[TrackedRun | None] = contextvars.ContextVar("tracked_run", default=None)


@contextlib.contextmanager
def tracked(name: str, spec: RunSpec) -> Iterator[TrackedRun]:
    """An MLflow run for the flow run at hand, nested in the one around it."""
    around, runtime = _current.get(), spec.runtime
    run = _start(name, runtime.mlflow_uri, runtime.mlflow_experiment, runtime.scratch, around)
    run.params({"spec_digest": spec.digest(), "parent": spec.parent.path, "target": spec.target.name})
    if not around:
        content = spec.model_dump(mode="json", exclude={"runtime"})  # which may hold a secret, and changes nothing
        run.params(_flat(content))
        run.text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "spec.yaml")
        run._note(lambda client, ids: _watch(run.uri, run.token, ids.run))
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


def current_run() -> TrackedRun | None:
    """The innermost run around."""
    return _current.get()


def track_use(uri: str, key: str, name: str, scratch: str, make: Callable[[str], Model]) -> bool:
    """A run of its own that uses the model of a key and makes another.

    Args:
        make: the model to make, from the name of the used one.

    Returns:
        Whether MLflow knows a model of this key.

    Raises:
        Exception: whatever MLflow raises where it does not answer.
    """
    client = _client(uri)
    for experiment in client.search_experiments():
        used = find_model(client, experiment.experiment_id, key)
        if used:
            run = _start(name, uri, experiment.name, scratch, None)
            run._use_logged(used.model_id)
            run.makes(make(used.name))
            run.end("FINISHED")
            return True
    return False


def tracking_client(uri: str) -> Any:
    """MLflow's own client, to read with."""
    return _client(uri)


def model_text(uri: str, model: Any, name: str) -> str | None:
    """A text file beside a logged model; none where there is none, or it cannot be reached."""
    with contextlib.suppress(MlflowException, OSError), tempfile.TemporaryDirectory() as directory:
        place = get_artifact_repository(model.artifact_location, tracking_uri=uri)
        return Path(place.download_artifacts(name, directory)).read_text()
    return None


def _start(name: str, uri: str, experiment: str, scratch: str, around: TrackedRun | None) -> TrackedRun:
    token, started_ms, box = uuid.uuid4().hex, int(time.time() * 1000), _outbox(uri)
    outermost = around.outermost if around else token
    tags = {
        "mlflow.runName": name,
        PROCESS_TAG: this_process(),
        "prefect.flow_run_id": str(flow_run.get_id()),
        "prefect.flow_run_url": str(flow_run.get_flow_run_ui_url()),
        TOKEN_TAG: token,
        OUTERMOST_TAG: outermost,
    }

    def create() -> None:
        client = _client(uri)
        if not around:
            _fail_orphans(client)
        own = _experiment_id(client, uri, experiment)
        if around and around.token in _known:
            tags["mlflow.parentRunId"] = _known[around.token].run
        known = runs_tagged(client, own, TOKEN_TAG, token)  # if the answer to the first call was lost
        run = known[0] if known else client.create_run(own, start_time=started_ms, tags=tags, run_name=name)
        _known[token] = Ids(run.info.run_id, own)

    if not around:
        for left in left_place(scratch, uri).glob("*.json"):
            box.put(outermost, functools.partial(end_left, _client(uri), left))
    box.put(outermost, create)
    if not around or box.answers:
        box.flush()
    run_id = _known[token].run if token in _known else None
    return TrackedRun(uri=uri, experiment=experiment, run_id=run_id, token=token, outermost=outermost, scratch=scratch)


def _watch(uri: str, token: str, run_id: str) -> None:
    """Log processor, memory, disk, network and GPU use of this machine, every ten seconds until the run ends."""
    resumed = token in _monitors
    if resumed:
        _monitors[token].finish()
    _monitors[token] = SystemMetricsMonitor(run_id, resume_logging=resumed, tracking_uri=uri)
    _monitors[token].start()


def _mark(uri: str, token: str, gap: Gap) -> None:
    """Note a gap in a run whose records came late."""
    if token in _known:
        text = f"no answer from {moment(gap.since_s)} to {moment(gap.until_s)}: {gap.records} records came late"
        _gaps[token].append(text)
        _client(uri).set_tag(_known[token].run, GAP_TAG, "; ".join(_gaps[token])[-5000:])
    if token in _monitors:  # it ends with the first call that fails
        _watch(uri, token, _known[token].run)


@functools.lru_cache(maxsize=8)
def _outbox(uri: str) -> Outbox:
    def ask() -> None:
        _client(uri).search_experiments(max_results=1)

    return Outbox(uri, ask, functools.partial(_mark, uri))


def crash_orphans(uri: str) -> None:
    """Close runs as KILLED whose process, one of this machine, has ended without closing them."""
    try:
        _fail_orphans(_client(uri))
    except (MlflowException, OSError) as error:
        log.warning("MLflow at %s was not asked for runs whose process is gone: %s", uri, error)


def _fail_orphans(client: MlflowClient) -> None:
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
