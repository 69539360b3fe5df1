"""Faults that are really injected: what their tests share, and what each says for the table of `benchmarks.faults`.

A pytest plugin (named in conftest.py). A test marked `fault(what, how)` is a row of the table.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from puzzle_core.spec import RunSpec

ROOT = Path(__file__).parents[1]
_started: list[subprocess.Popen[bytes]] = []
OPEN = ("RUNNING", "PENDING", "SCHEDULED", "CANCELLING")


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Say what a fault came to, once that was checked: columns of the table."""

    def say(*, run: str, store: str = "", shown: str = "") -> None:
        for column, said in (("run", run), ("store", store), ("shown", shown)):
            record_property(column, said)

    return say


@pytest.fixture
def next_command(prefect_server: str, own_environment: None) -> Callable[..., None]:
    """Run the next command, in this process, against the server of this session; it must end well."""
    from flows.cli.main import main

    def run(*arguments: Any) -> None:
        assert main([str(argument) for argument in arguments]) == 0

    return run


def start(place: Path, *arguments: Any, **environment: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own, in a directory of its own."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    whole = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    whole |= {"PREFECT_LOCAL_STORAGE_PATH": str(place / "results")}
    place.mkdir(exist_ok=True)
    with (place / "stdout").open("wb") as stdout, (place / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=place, env=whole, stdout=stdout, stderr=stderr)
    _started.append(process)
    return process


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """End the commands that a test started: one that failed leaves them running."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes], place: Path) -> None:
    """Wait for something to happen while the command runs."""
    while not condition():
        assert process.poll() is None, f"ended too early:\n{(place / 'stderr').read_text()}"
        time.sleep(0.002)


def kill_when(process: subprocess.Popen[bytes], condition: Callable[[], Any], place: Path) -> None:
    """kill -9, as soon as the condition holds."""
    wait_until(condition, process, place)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def shown_running(spec: RunSpec, longest_seconds: float = 120) -> list[str]:
    """Flow, task and MLflow runs of a spec that are shown as if they ran, once none is, or after so many seconds.

    The server writes down what becomes of task runs a moment after it happens.
    """
    deadline = time.monotonic() + longest_seconds
    while (found := _shown_running(spec)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _shown_running(spec: RunSpec) -> list[str]:
    """Runs are told from those of other specs by its name in Prefect, and by its experiment in MLflow."""
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter

    ours = FlowRunFilter.model_validate({"name": {"like_": spec.name}})
    open_tasks = TaskRunFilter.model_validate({"state": {"type": {"any_": OPEN}}})
    with get_client(sync_client=True) as client:
        flow_runs = client.read_flow_runs(flow_run_filter=ours)
        found = [run.name for run in flow_runs if run.state_type.value in OPEN]
        found += [run.name for run in client.read_task_runs(flow_run_filter=ours, task_run_filter=open_tasks)]
    assert flow_runs
    tracking = MlflowClient(spec.runtime.mlflow_uri)
    experiment = tracking.get_experiment_by_name(spec.runtime.mlflow_experiment)
    runs = tracking.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    return found + [run.info.run_name for run in runs]


def ends(spec: RunSpec) -> dict[str, list[str]]:
    """How the outermost runs of a spec are shown to have ended, in Prefect and in MLflow, the oldest first."""
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    ours = FlowRunFilter.model_validate({"name": {"like_": f"library of {spec.name}"}})
    with get_client(sync_client=True) as client:
        flow_runs = sorted(client.read_flow_runs(flow_run_filter=ours), key=lambda run: run.created)
    tracking = MlflowClient(spec.runtime.mlflow_uri)
    experiment = tracking.get_experiment_by_name(spec.runtime.mlflow_experiment)
    runs = tracking.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return {"Prefect": [run.state_name for run in flow_runs], "MLflow": [run.info.status for run in runs]}


def kept_open(place: Path) -> dict[str, int]:
    """How many runs are open in the databases that commands on the defaults leave in `.puzzle/`."""
    names, found = ", ".join(f"'{name}'" for name in OPEN), {}
    for kind, file, column in (
        ("flow_run", "prefect/prefect.db", "state_type"),
        ("task_run", "prefect/prefect.db", "state_type"),
        ("runs", "mlflow.db", "status"),
    ):
        with sqlite3.connect(place / ".puzzle" / file) as database:
            total, left = database.execute(
                f"select count(*), coalesce(sum({column} in ({names})), 0) from {kind}"
            ).fetchone()
        assert total
        found[kind] = left
    return found
