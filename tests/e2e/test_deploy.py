"""`make up` as users have it: services on loopback, deployments, a worker; runs are started as the UI starts them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from flows.permissions import ALLOWED
from flows.services.prefect_server import PREFECT_HOME, free_port, running_api
from flows.services.up import Ports, processes, services
from puzzle_core.spec import parse_spec
from tests.sockets import listening
from tests.workflow import artifacts, check_whole, merged, of_stage, placed, publish_costs

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
FLOWS = {"puzzle", "build-library", "build-layers", "fan-out-library", "search-architecture", "train-child"}
FLOWS |= {"research-targets", "add-target"}
ENDLESS = 1_000_000  # epochs
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


class Up(NamedTuple):
    """Running services: where they were started, and where they answer."""

    place: Path
    ports: Ports
    said: str

    @property
    def tracking(self):
        return f"sqlite:///{self.place}/.puzzle/mlflow.db"

    def call(self, method, path, body=None):
        """One request as the UI makes it: the status, and the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports.prefect}/api{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"} | (self.token() if method != "GET" else {}),
        )
        for left in reversed(range(10)):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                said = error.read().decode()
                if error.code != 503 or not left:  # a server on SQLite answers so when two write at once
                    return error.code, said
                time.sleep(0.5)
        raise AssertionError("unreachable")

    def token(self):
        """The headers of a change, as the UI asks for them."""
        url = f"http://127.0.0.1:{self.ports.prefect}/api/csrf-token?client=test"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return {"Prefect-Csrf-Token": json.loads(answer.read())["token"], "Prefect-Csrf-Client": "test"}

    def deployment(self, name):
        return next(found for found in self.call("POST", "/deployments/filter", {})[1] if found["name"] == name)

    def run(self, name, spec, **parameters):
        """Start a flow run with a specification."""
        return self.start(name, {"spec": spec} | parameters)

    def start(self, name, parameters):
        """Start a flow run with the form's values."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        status, run = self.call("POST", path, {"parameters": parameters})
        assert status == 201, run
        return run["id"]

    def states(self, name):
        """Names of the states of a deployment's runs."""
        asked = {"flow_runs": {"deployment_id": {"any_": [self.deployment(name)["id"]]}}}
        return [run["state"]["name"] for run in self.call("POST", "/flow_runs/filter", asked)[1]]

    def start_on_events(self, enabled):
        """Turn the automation on or off that starts re-searches."""
        (found,) = self.call("POST", "/automations/filter", {"automations": {"name": {"any_": ["puzzle-new-work"]}}})[1]
        assert self.call("PATCH", f"/automations/{found['id']}", {"enabled": enabled})[0] == 204

    def state(self, run):
        return self.call("GET", f"/flow_runs/{run}")[1]["state"]

    def ended(self, run, seconds=900):
        deadline = time.monotonic() + seconds
        while self.state(run)["type"] not in ENDED and time.monotonic() < deadline:
            time.sleep(0.5)
        return self.state(run)

    def running(self):
        """Flow runs that have not ended, those that are scheduled among them."""
        states = {"state": {"type": {"any_": ["SCHEDULED", "RUNNING", "PENDING", "CANCELLING"]}}}
        return self.call("POST", "/flow_runs/filter", {"flow_runs": states})[1]

    def left(self):
        """Flow runs that have not ended, after those of them that have not begun are cancelled."""
        runs = self.running()
        for run in runs:
            if run["state"]["type"] == "SCHEDULED":
                self.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}})
        return runs

    def training(self):
        """Ids of task runs that train a variant now."""
        asked = {"state": {"type": {"any_": ["RUNNING"]}}, "name": {"like_": "bld layer"}}
        return {run["id"] for run in self.call("POST", "/task_runs/filter", {"task_runs": asked})[1]}

    def is_up(self):
        """Whether every service answers."""
        try:
            for service in services(self.place, self.ports):
                urllib.request.urlopen(service.health, timeout=10).close()
        except OSError:
            return False
        return True

    def shown(self):
        """Artifacts in the UI by key, the latest of each."""
        found = self.call("POST", "/artifacts/latest/filter", {"limit": 200})[1]
        return {artifact["key"]: artifact for artifact in found}


def act(action, place, ports):
    """`make up` and `make down`, which are one line each."""
    command = [sys.executable, "-m", "flows.cli", action]
    if action == "up":
        command += ["--prefect-port", str(ports.prefect), "--mlflow-port", str(ports.mlflow)]
    below = place.parent  # the directories of all tests
    allowed = {"runtime.store": [f"{below}/*"], "runtime.scratch": [f"{below}/*"]}
    allowed["runtime.mlflow_uri"] = [f"sqlite:///{below}/*"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), ALLOWED: json.dumps(allowed)}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def _started(tmp_path_factory):
    """The services, on ports of their own, in a place of their own; events start no runs unless a test says so."""
    place, ports = tmp_path_factory.mktemp("up"), Ports(free_port(), free_port())
    (place / "deployments").symlink_to(ROOT / "deployments")
    shutil.copy(ROOT / "prefect.yaml", place)
    done = act("up", place, ports)
    assert done.returncode == 0, done.stderr
    started = Up(place, ports, done.stdout)
    started.start_on_events(False)
    yield started
    act("down", place, ports)
    assert processes(place) == {}


@pytest.fixture
def up(_started):
    """The services as a start leaves them: all of them answer, and no run is open, before the test and after it."""
    if not _started.is_up():  # the test before has failed
        act("down", _started.place, _started.ports)
        assert act("up", _started.place, _started.ports).returncode == 0
    yield _started
    if _started.is_up():
        left = _started.running()
        for state in ("CANCELLING", "CANCELLED"):  # a run that ends as it is cancelled stays as CANCELLING for ever
            for run in left:
                asked = {"state": {"type": state}, "force": state == "CANCELLED"}
                _started.call("POST", f"/flow_runs/{run['id']}/set_state", asked)
            assert wait_for(lambda: not any(of_run(run["id"]) for run in left))
        assert left == [], "the test left runs that had not ended"


@pytest.fixture
def values(up, content, tmp_path):
    """A pico spec as the form has it; its store and scratch are of this test, and its costs are there."""
    found = merged(placed(content, tmp_path), {"runtime": {"mlflow_uri": up.tracking}})
    publish_costs(parse_spec(found, "test"))
    return found


def test_one_command_starts_everything_on_loopback_only(up):
    assert up.said.count("http://127.0.0.1:") == 2
    for service in services(up.place, up.ports):
        with urllib.request.urlopen(service.health, timeout=10) as answer:
            assert answer.status == 200
    for port in up.ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
            assert b"<html" in page.read().lower()
    opened = listening(map(psutil.Process, processes(up.place)))
    assert {address.port for address in opened} >= set(up.ports)
    assert {address.ip for address in opened} == {"127.0.0.1"}


def test_every_flow_is_there_to_be_started(up):
    found = up.call("POST", "/deployments/filter", {})[1]
    assert {deployment["name"] for deployment in found} == FLOWS
    for deployment in found:
        assert deployment["enforce_parameter_schema"]
        assert str(ROOT) not in json.dumps(deployment)
    (schedule,) = up.deployment("research-targets")["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("*/15 * * * *", False)


def test_a_second_start_is_refused_and_changes_nothing(up):
    before = processes(up.place).keys()
    done = act("up", up.place, up.ports)
    assert done.returncode == 1
    assert "running already" in done.stderr
    assert processes(up.place).keys() >= {pid for pid in before if (Path("/proc") / str(pid)).exists()}


def test_wrong_input_is_refused_with_a_message(up, values):
    path = f"/deployments/{up.deployment('puzzle')['id']}/create_flow_run"
    for change, said in (
        ({"bld": {"tokens": -5}}, "'spec.bld.tokens'. Failure reason: -5 is less than or equal to the minimum of 0"),
        ({"bdl": {"tokens": 5}}, "'bdl' was unexpected"),
    ):
        status, answer = up.call("POST", path, {"parameters": {"spec": merged(values, change)}})
        assert status == 409
        assert said in json.loads(answer)["detail"]


def test_a_run_from_the_form_leaves_artifacts_and_reads_like_the_method(up, values, tmp_path):
    state = up.ended(up.run("puzzle", values))
    assert state["type"] == "COMPLETED", state["message"]
    made = artifacts(tmp_path / "store")
    for stage, number in {"bld": 10, "score": 20, "search": 1, "gkd": 1, "report": 1}.items():
        assert len(of_stage(made, stage)) == number
    check_whole(tmp_path / "store", tmp_path / "unused")
    shown = up.shown()
    library = json.loads(shown["library-pico"]["data"])
    assert len(library) == 10
    assert {row["variant"] for row in library} == {"attn:kv2", "ffn:i24"}
    assert len(json.loads(shown["scores-pico"]["data"])) == 20
    assert "solution 1" in shown["architecture-pico-this-machine-chatbot"]["data"]
    assert "top-1 accuracy" in shown["child-pico"]["data"]
    assert shown["frontier-pico"]["data"].startswith("data:image/png;base64,")
    assert {float(shown[key]["data"]) for key in ("progress-bld-pico", "progress-scores-pico")} == {100.0}
    assert f"http://127.0.0.1:{up.ports.mlflow}/#/experiments/" in shown["mlflow-pico"]["data"]

    again = up.run("puzzle", merged(values, {"name": "again"}))
    assert up.ended(again)["type"] == "COMPLETED"
    asked = {"state": {"name": {"any_": ["Cached"]}}, "name": {"like_": "bld layer"}}
    within = {"flow_runs": {"start_time": {"after_": up.call("GET", f"/flow_runs/{again}")[1]["start_time"]}}}
    assert wait_for(lambda: up.call("POST", "/task_runs/count", within | {"task_runs": asked})[1] == 10)


def test_a_new_library_and_a_new_target_lead_by_themselves_to_registered_answers(up, values, tmp_path):
    """Nobody starts a re-search here: events do, through the automation that `make up` has registered."""
    targets = tmp_path / "targets"
    targets.mkdir()
    shutil.copy(ROOT / "deployments/targets/l4.yaml", targets)
    deployment = up.deployment("research-targets")
    path = f"/deployments/{deployment['id']}"

    def searched():
        return of_stage(artifacts(tmp_path / "store"), "search")

    try:
        up.start_on_events(True)
        parameters = {"parameters": {"spec": values, "targets": str(targets)}}
        assert up.call("PATCH", path, parameters)[0] == 204  # another specification: an event
        assert wait_for(lambda: "NoLibrary" in up.states("research-targets"))
        assert not up.deployment("research-targets")["schedules"][0]["active"]
        assert up.ended(up.run("build-library", values))["type"] == "COMPLETED"
        assert wait_for(lambda: len(searched()) == 1)
        first = searched()
        assert wait_for(lambda: up.deployment("research-targets")["schedules"][0]["active"])
        target = yaml.safe_load((ROOT / "deployments/targets/b200.yaml").read_text())
        added = {"target": target, "store": values["runtime"]["store"]}
        assert up.ended(up.start("add-target", added))["type"] == "COMPLETED"
        assert wait_for(lambda: len(searched()) == 2)
        (new,) = searched() - first
        client = MlflowClient(up.tracking)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]

        def registered():
            return client.search_logged_models(experiments, filter_string=f"tags.`puzzle.key` = '{new}'")

        assert wait_for(registered)
        assert json.loads((tmp_path / "store" / new / "record.json").read_text())["work"]["target"] == "b200"
    finally:
        up.start_on_events(False)
        (schedule,) = up.deployment("research-targets")["schedules"]
        assert up.call("PATCH", f"{path}/schedules/{schedule['id']}", {"active": False})[0] == 204
        assert up.call("PATCH", path, {"parameters": deployment["parameters"]})[0] == 204
        assert wait_for(lambda: not up.left())


def test_cancelling_stops_the_work_and_leaves_the_store_whole(up, values, tmp_path):
    run = start_training(up, merged(values, {"name": "stopped", "bld": {"epochs": ENDLESS}}))
    before = artifacts(tmp_path / "store")
    up.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert wait_for(lambda: not of_run(run))
    assert up.ended(run)["type"] == "CANCELLED"
    assert artifacts(tmp_path / "store") == before
    check_whole(tmp_path / "store", tmp_path / "unused")
    assert not list((tmp_path / "store" / ".staging").glob("*"))
    client = MlflowClient(up.tracking)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [found.info.run_id for found in client.search_runs(experiments, "attributes.status = 'RUNNING'")] == []
    assert up.running() == []

    again = up.run("build-library", values)
    assert up.ended(again)["type"] == "COMPLETED"


@pytest.mark.long
def test_a_stop_cancels_what_runs_and_the_next_start_finds_the_data(up, values):
    endless, home = merged(values, {"name": "endless", "bld": {"epochs": ENDLESS}}), up.place / PREFECT_HOME
    before = up.call("POST", "/flow_runs/count", {})[1]
    assert running_api(home) == f"http://127.0.0.1:{up.ports.prefect}/api"
    cancelled = start_training(up, endless)
    done = act("down", up.place, up.ports)
    assert done.stdout.startswith("stopped ")
    assert processes(up.place) == {}
    assert running_api(home) is None
    assert act("up", up.place, up.ports).returncode == 0
    assert up.state(cancelled)["type"] == "CANCELLED"
    assert up.call("POST", "/flow_runs/count", {})[1] > before


@pytest.mark.fault(
    "a power cut during a worker's run", "SIGKILL to server, worker, MLflow and run at once, then `make up`"
)
def test_data_are_kept_no_process_is_left_and_no_dead_run_shows_as_running(up, values, tmp_path, outcome):
    """Kills the services, and starts them again."""
    before = up.call("POST", "/flow_runs/count", {})[1]
    crashed = start_training(up, merged(values, {"name": "endless", "bld": {"epochs": ENDLESS}}))
    for pid in processes(up.place):  # as a power cut does
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not processes(up.place))
    assert "marked as crashed" in act("up", up.place, up.ports).stderr
    assert up.call("POST", "/flow_runs/count", {})[1] > before
    assert up.state(crashed)["type"] == "CRASHED"
    assert up.running() == []
    check_whole(tmp_path / "store", tmp_path / "unused")
    tags = f"tags.`prefect.flow_run_id` = '{crashed}'"
    client = MlflowClient(up.tracking)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [run.info.status for run in client.search_runs(experiments, tags)] == ["KILLED"]
    outcome(
        run="found dead by the next `make up`; to be started again",
        store="whole",
        shown="Crashed and KILLED, with what was within; none open",
    )


def start_training(up, spec):
    """A run of the library that is at its first trainings."""
    before = up.training()
    run = up.run("build-library", spec)
    assert wait_for(lambda: up.training() - before), up.state(run)
    assert of_run(run)
    return run


def of_run(run):
    """Processes that execute a flow run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT__FLOW_RUN_ID={run}".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds=900):
    """The condition's answer once it holds, or at the end."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return answer
