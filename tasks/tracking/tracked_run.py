"""MLflow runs that tasks write to: parameters, metrics, files, and the models and texts that a run uses and makes.

No run waits for MLflow: everything goes through the outbox (tasks/tracking/outbox.py). Where MLflow does not answer,
the run goes on and logs it; once MLflow answers again, the outbox sends what waited and notes the gap in the run. What
was not sent before the process ends is left to the next run (tasks/tracking/recovery.py). Lineage is noted from
manifests, so the next run completes it.
"""

import functools
import logging
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
)
from prefect.runtime import flow_run

from puzzle_core.records import Record, canonical_json
from tasks.runtime.process import this_process
from tasks.runtime.software import software
from tasks.tracking.mlflow_client import (
    PROCESS_TAG,
    ensure_experiment,
    kill_orphaned_runs,
    mlflow_client,
    runs_tagged,
)
from tasks.tracking.outbox import Gap, Outbox
from tasks.tracking.recovery import (
    GAP_TAG,
    OUTERMOST_TAG,
    PendingRunEnd,
    deliver_run_end,
    pending_directory,
    time_text,
)
from tasks.tracking.system_metrics import restart_monitor, start_monitor, stop_monitor
from tasks.tracking.tracked_models import (
    TrackedModel,
    Values,
    Version,
    complete_model,
    link_models,
    make_loadable,
    note_model,
    register,
)

log = logging.getLogger("puzzle")
MOST_METRICS, MOST_PARAMS = 1000, 100
"""MLflow's limits for one request."""
TOKEN_TAG = "puzzle.token"
T = TypeVar("T")


class RunIds(NamedTuple):
    """MLflow's ids of a run and its experiment."""

    run: str
    experiment: str


class TextsInput(NamedTuple):
    """A split of tokens that a run reads: name, split, digest, source, and sizes."""

    name: str
    split: str
    digest: str
    source: dict[str, Any]
    profile: dict[str, Any]


_ids: dict[str, RunIds] = {}  # of this process's runs, by token
_gaps: defaultdict[str, list[str]] = defaultdict(list)


class TrackedRun(Record):
    """An MLflow run that any task may write to. Records are sent in order, later if MLflow does not answer now.

    `token` identifies the run before MLflow has given it an id. `outermost` is the token of the run that it is nested
    in at the outermost level, or its own.
    """

    uri: str
    experiment: str
    run_id: str | None
    token: str
    outermost: str
    scratch: str

    def metrics(self, values: Values) -> None:
        """Log metrics: (name, value, step)."""
        for part in _parts(_metrics(values), MOST_METRICS):
            self.send(lambda client, ids, part=part: client.log_batch(ids.run, metrics=part))  # type: ignore[misc]

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; values longer than MLflow takes are cut."""
        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        for part in _parts(params, MOST_PARAMS):
            self.send(lambda client, ids, part=part: client.log_batch(ids.run, params=part))  # type: ignore[misc]

    def artifacts(self, directory: Path, place: str) -> None:
        """Upload a directory of small files under the path `place`."""
        self.send(lambda client, ids: client.log_artifacts(ids.run, str(directory), place))

    def text(self, text: str, name: str) -> None:
        """Upload a text as a file."""
        self.send(lambda client, ids: client.log_text(ids.run, text, name))

    def reads(self, texts: list[TextsInput]) -> None:
        """Note texts as datasets that this run uses."""
        datasets = [DatasetInput(_dataset(entry), [InputTag("mlflow.data.context", entry.split)]) for entry in texts]
        self.send(lambda client, ids: client.log_inputs(ids.run, datasets=datasets))

    def uses(self, *models: TrackedModel) -> None:
        """Note models as inputs of this run. A model that MLflow does not have yet is logged without a source run."""

        def note(client: MlflowClient, ids: RunIds) -> None:
            logged_models = [note_model(client, ids.experiment, model, None) for model in models]
            inputs = client.get_run(ids.run).inputs  # MLflow refuses an input that it already has
            known = {used.model_id for used in inputs.model_inputs} if inputs else set()
            new = [LoggedModelInput(logged.model_id) for logged in logged_models if logged.model_id not in known]
            if new:
                client.log_inputs(ids.run, models=new)
            for model, logged in zip(models, logged_models, strict=True):
                complete_model(client, model, logged, functools.partial(_complete_curve, client, ids))

        self.send(note)

    def uses_logged(self, logged: LoggedModel) -> None:
        """Note a model that MLflow has as an input of this run."""
        self.send(lambda client, ids: client.log_inputs(ids.run, models=[LoggedModelInput(logged.model_id)]))

    def makes(self, model: TrackedModel, version: Version | None = None, on: TextsInput | None = None) -> None:
        """Note a model as an output of this run, and register it as a version where one is given.

        Args:
            model: what the run made; its results are metrics of the run and of the model.
            version: the version that it is registered as.
            on: the texts that the results hold for.
        """

        def note(client: MlflowClient, ids: RunIds) -> None:
            logged = note_model(client, ids.experiment, model, ids.run)
            outputs = client.get_run(ids.run).outputs
            if logged.model_id not in {made.model_id for made in (outputs.model_outputs if outputs else ())}:
                client.log_outputs(ids.run, [LoggedModelOutput(logged.model_id, step=0)])
                results = _metrics([(name, value, 0) for name, value in model.results.items()], logged.model_id, on)
                for part in _parts(results, MOST_METRICS):
                    client.log_batch(ids.run, metrics=part)
            complete_model(client, model, logged, functools.partial(_complete_curve, client, ids))
            logged = make_loadable(client, model, logged)
            if version:
                register(client, logged, version, ids.run)

        self.send(note)

    def experiment_id(self) -> str | None:
        """MLflow's id of this run's experiment; none where MLflow has not answered yet."""
        return _ids[self.token].experiment if self.token in _ids else None

    def monitor(self) -> None:
        """Log system metrics into this run until it ends."""
        self.send(lambda client, ids: start_monitor(self.uri, self.token, ids.run))

    def end(self, status: str) -> int:
        """End the run as FINISHED, FAILED or KILLED.

        The outermost run waits until everything is sent; where MLflow does not answer, it leaves its end to the next
        run.

        Returns:
            How many records of the outermost run are not in MLflow; 0 for other runs.
        """
        ended_ms, outbox = int(time.time() * 1000), outbox_of(self.uri)
        if self.token == self.outermost:
            self.send(lambda client, ids: link_models(client, ids.experiment))
            self.send(lambda client, ids: stop_monitor(self.token))
        self.send(lambda client, ids: _end(client, ids, self.token, status, ended_ms))
        if self.token != self.outermost:
            return 0
        if not outbox.flush():
            since_s, dropped = outbox.down_since_s or time.time(), outbox.drop(self.outermost)
            log.warning(
                "%d records of this run are not in MLflow at %s: run it again once that answers, which computes "
                "nothing and notes what is in the store",
                dropped,
                outbox.where,
            )
            pending = PendingRunEnd(
                experiment=self.experiment, token=self.token, status=status, ended_ms=ended_ms, since_s=since_s
            )
            try:
                pending.write(pending_directory(self.scratch, self.uri) / f"{self.token}.json")
            except OSError as error:
                log.warning("the end of this run cannot be left to the next run: %s", error)
            return dropped + outbox.refused(self.outermost)
        return outbox.refused(self.outermost)

    def abandon(self) -> None:
        """Send nothing more of the outermost run."""
        outbox_of(self.uri).drop(self.outermost)

    # `Any`: the outbox ignores the values that MLflow's methods return.
    def send(self, act: Callable[[MlflowClient, RunIds], Any]) -> None:
        """Put a request into the outbox."""

        def send() -> None:
            ids = _ids.get(self.token)
            if ids is None and self.run_id:  # another process than this one started the run
                ids = RunIds(self.run_id, mlflow_client(self.uri).get_run(self.run_id).info.experiment_id)
                _ids[self.token] = ids
            if ids:
                act(mlflow_client(self.uri), ids)

        outbox_of(self.uri).put(self.outermost, send)


def start_run(name: str, uri: str, experiment: str, scratch: str, around: TrackedRun | None) -> TrackedRun:
    """Start an MLflow run for the present flow run.

    Args:
        name: of the run.
        uri: MLflow's tracking URI.
        experiment: its name.
        scratch: where the end is left if MLflow does not receive it.
        around: the run that it is nested in.
    """
    token, started_ms, outbox = uuid.uuid4().hex, int(time.time() * 1000), outbox_of(uri)
    outermost = around.outermost if around else token
    tags = {
        "mlflow.runName": name,
        PROCESS_TAG: this_process(),
        "prefect.flow_run_id": str(flow_run.get_id()),
        "prefect.flow_run_url": str(flow_run.get_flow_run_ui_url()),
        TOKEN_TAG: token,
        OUTERMOST_TAG: outermost,
    } | _source_tags()

    def create() -> None:
        client = mlflow_client(uri)
        if not around:
            kill_orphaned_runs(client)
        experiment_id = ensure_experiment(client, uri, experiment)
        if around and around.token in _ids:
            tags["mlflow.parentRunId"] = _ids[around.token].run
        created = runs_tagged(client, experiment_id, TOKEN_TAG, token)  # by a request whose response was lost
        run = created[0] if created else client.create_run(experiment_id, started_ms, tags=tags, run_name=name)
        _ids[token] = RunIds(run.info.run_id, experiment_id)

    if not around:
        for file in pending_directory(scratch, uri).glob("*.json"):
            outbox.put(outermost, functools.partial(deliver_run_end, mlflow_client(uri), file))
    outbox.put(outermost, create)
    if not around or outbox.answers:
        outbox.flush()
    run_id = _ids[token].run if token in _ids else None
    return TrackedRun(uri=uri, experiment=experiment, run_id=run_id, token=token, outermost=outermost, scratch=scratch)


def _source_tags() -> dict[str, str]:
    """MLflow's own tag of the commit, where the code lies in a checkout, and what else tells the code apart."""
    own = software()
    tags = {"puzzle.code": own.code, "puzzle.dirty": str(own.dirty).lower()}
    return tags | ({"mlflow.source.git.commit": own.commit} if own.commit else {})


@functools.lru_cache(maxsize=8)
def outbox_of(uri: str) -> Outbox:
    """The outbox of this process to the MLflow at this URI."""

    def check() -> None:
        mlflow_client(uri).search_experiments(max_results=1)

    return Outbox(uri, check, functools.partial(_note_gap, uri))


def _note_gap(uri: str, token: str, gap: Gap) -> None:
    """Note a gap in a run whose records came late, and start its monitor again."""
    if token in _ids:
        text = f"no answer from {time_text(gap.since_s)} to {time_text(gap.until_s)}: {gap.records} records came late"
        _gaps[token].append(text)
        mlflow_client(uri).set_tag(_ids[token].run, GAP_TAG, "; ".join(_gaps[token])[-5000:])
        restart_monitor(uri, token, _ids[token].run)


def _end(client: MlflowClient, ids: RunIds, token: str, status: str, ended_ms: int) -> None:
    client.set_terminated(ids.run, status, ended_ms)
    for run in runs_tagged(client, ids.experiment, TOKEN_TAG, token):
        if run.info.run_id != ids.run:  # created by a request whose response was lost
            client.delete_run(run.info.run_id)


def _complete_curve(client: MlflowClient, ids: RunIds, values: Values) -> None:
    """Log the points of a curve that the run does not have."""
    metrics = _metrics(values)
    names = client.get_run(ids.run).data.metrics.keys() & {metric.key for metric in metrics}
    known = {(name, metric.step) for name in names for metric in client.get_metric_history(ids.run, name)}
    for part in _parts([metric for metric in metrics if (metric.key, metric.step) not in known], MOST_METRICS):
        client.log_batch(ids.run, metrics=part)


def _metrics(values: Values, model_id: str | None = None, on: TextsInput | None = None) -> list[Metric]:
    """Metrics as MLflow takes them, of a logged model and on a dataset where these are given."""
    now, dataset = int(time.time() * 1000), _dataset(on) if on else None
    return [
        Metric(
            _metric_name(name), value, now, step, model_id=model_id,
            dataset_name=dataset.name if dataset else None, dataset_digest=dataset.digest if dataset else None,
        )
        for name, value, step in values
    ]  # fmt: skip


def _dataset(texts: TextsInput) -> Dataset:
    """A split of tokens as MLflow's dataset."""
    source, profile = canonical_json(texts.source), canonical_json(texts.profile)
    return Dataset(texts.name[:500], texts.digest[:36], "artifact store", source, profile=profile)


def _metric_name(name: str) -> str:
    """The name with characters replaced that MLflow does not take: columns of a cost table are named by users."""
    return re.sub(r"[^\w\-. /]", "-", name.replace("+", " "))


def _parts(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
