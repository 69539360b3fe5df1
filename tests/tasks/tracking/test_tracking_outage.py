"""A real MLflow server that is killed, or stalls, while runs write to it: they go on, say so, and nothing is lost."""

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from mlflow import MlflowClient

from flows.services.prefect_server import free_port
from flows.train_child import train_child
from puzzle_core.spec import parse_spec
from tasks.tracking import outbox
from tasks.tracking.recovery import GAP_TAG
from tasks.tracking.tracked_models import KEY_TAG, WHOLE_TAG, TrackedModel
from tasks.tracking.tracking import tracked
from tests.workflow import merged, plan_of


class Server:
    """An MLflow server as `make up` starts it, on loopback."""

    def __init__(self, place):
        self.port, self._place, self._process = free_port(), place, None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._place}/mlflow.db"]
        command += ["--artifacts-destination", str(self._place / "artifacts")]
        with (self._place / "server.log").open("ab") as log:
            environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                command, cwd=self._place, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self._place / "server.log").read_text())

    def signal(self, number):
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.signal(signal.SIGCONT)
    running.signal(signal.SIGKILL)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Seconds for what takes a minute."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 3.0)


@pytest.fixture
def patient(monkeypatch):
    """Give a server that is back the time that it needs on a busy machine."""

    def set_limits():
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        monkeypatch.setattr(outbox, "FLUSH_SECONDS", 200.0)

    return set_limits


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def test_what_is_recorded_while_the_server_is_gone_follows_when_it_is_back(server, content, tmp_path, caplog, patient):
    runtime = {"mlflow_uri": server.url, "mlflow_experiment": "killed", "scratch": str(tmp_path)}
    spec, client = parse_spec(merged(content, {"runtime": runtime}), "test"), MlflowClient(server.url)
    with caplog.at_level(logging.WARNING, "puzzle"), tracked("outer", spec) as outer:
        outer.metrics([("loss", 3.0, 1)])
        assert wait_for(lambda: client.get_metric_history(outer.run_id, "loss"))
        server.signal(signal.SIGKILL)
        outer.metrics([("loss", 2.0, 2)])
        assert wait_for(lambda: "cannot be reached, the run goes on without it" in caplog.text)
        with tracked("inner", spec) as inner:
            inner.makes(TrackedModel("child", "child-pico", "gkd/v1/late", files=lambda: {"README.md": "a card"}))
        assert inner.run_id is None  # nobody waited for the server, which was not there
        server.start()
        patient()
        outer.metrics([("loss", 1.0, 3)])
    assert "answers again" in caplog.text
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(outer.run_id, "loss")]
    assert sorted(losses) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    run = client.get_run(outer.run_id)
    assert run.info.status == "FINISHED"
    assert "records came late" in run.data.tags[GAP_TAG]
    (within,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{outer.run_id}'")
    assert (within.info.run_name, within.info.status) == ("inner", "FINISHED")
    (made,) = within.outputs.model_outputs
    assert [file.path for file in client.list_logged_model_artifacts(made.model_id)] == ["README.md"]
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_that_ends_while_the_server_stalls_is_ended_and_made_up_for_by_the_next(server, again, caplog, patient):
    spec = again(runtime={"mlflow_uri": server.url, "mlflow_experiment": "stalled"})
    plan, client = plan_of(spec)[0], MlflowClient(server.url)
    with caplog.at_level(logging.WARNING, "puzzle"):
        with tracked("stalled", spec) as outer:
            server.signal(signal.SIGSTOP)
            train_child(spec)
        assert "records of this run are not in MLflow" in caplog.text
        server.signal(signal.SIGCONT)
    patient()
    assert wait_for(lambda: client.get_run(outer.run_id).info.status == "RUNNING")
    train_child(spec)
    experiment = client.get_run(outer.run_id).info.experiment_id
    runs = client.search_runs([experiment])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "no answer after" in client.get_run(outer.run_id).data.tags[GAP_TAG]
    models = {model.model_type: model for model in client.search_logged_models([experiment])}
    assert models.keys() == {"parent", "block-library", "scores", "cost-table", "architecture", "child"}
    assert all(WHOLE_TAG in model.tags for model in models.values())
    assert models["child"].tags[KEY_TAG].startswith("gkd/")
    assert plan.inputs.parent in models["parent"].tags[KEY_TAG]
    (version,) = client.search_model_versions(f"tags.`{KEY_TAG}` = '{models['child'].tags[KEY_TAG]}'")
    assert client.get_model_version_by_alias(version.name, "this-machine-chatbot").version == version.version
