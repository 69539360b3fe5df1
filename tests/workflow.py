"""Whole runs on a pico parent: one Prefect server per session, specs of tiny budgets, and looks at what a run leaves.

A pytest plugin (named in conftest.py), so that flow tests and end-to-end tests share one server and one finished run.
Every spec has a store, scratch and MLflow of its own; the finished run is read only, which is checked after each test.
Costs are published beside the run and not measured, where a test is not about measuring: the shapes here are so small
that noise would decide the architecture.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import prefect.main  # noqa: F401  # sets up logging, which would remove the handlers of a test that imports it first
import pytest

from puzzle_core.architecture import Variant
from puzzle_core.spec import RunSpec, parse_spec
from puzzle_core.work import CostRecord, Timing
from tasks.runtime.private_files import private_directory

WORDS = ("the", "of", "and", "to", "in", "is", "for", "with", "layer", "head", "width", "loss", "model", "child")
TINY: dict[str, Any] = {
    "name": "pico",
    "data": {"sequence_length": 32},
    "variants": {"kv_heads": [2], "ffn_ratios": [0.5], "linear": False, "no_op": True},
    "importance": {"tokens": 256},
    "bld": {"tokens": 512, "batch_tokens": 128},
    "scoring": {"tokens": 128, "composition": "subblocks"},
    "gkd": {"tokens": 256, "batch_tokens": 128},
    "evaluation": {"tokens": 128, "timing_rounds": 3},
    "target": {"device": "cpu", "rounds": 3},
    "scenario": {"prompt_tokens": 8, "generated_tokens": 8, "limits": {"parameters": "90%"}},
    "search": {"frontier_points": 2, "baselines": ["uniform"]},
    "champion": {"kept_accuracy": 0.01, "measured_limits": False},
    "runtime": {"workers": 2},
}
TRAINED, SCORED = 10, 20  # variants and blocks of five layers
TRACKING = Path("mlflow/mlflow.db")
DEPLOYMENT_SERVICES = ("LATE_RUNS", "FOREMAN", "PAUSE_EXPIRATIONS", "CANCELLATION_CLEANUP", "TRIGGERS")
"""Loops of a Prefect server that runs of deployments need, and that take a part of an idle server's CPU time."""
_templates = tempfile.TemporaryDirectory(prefix="puzzle-tests-")


class Finished(NamedTuple):
    """A finished run: its spec as plain values, the key of its report, and what the server knows of it."""

    content: dict[str, Any]
    report: str
    recorded: "Recorded"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those of `changes` winning."""
    both = {
        name: merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in changes.items()
    }
    return base | both


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server for all flows of this session, set as the API of this process."""
    from flows.services.prefect_server import free_port, own_server

    home = tmp_path_factory.mktemp("prefect")
    private_directory(home)
    shutil.copy(_empty_server(tmp_path_factory), home)
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as environment:
            for service in DEPLOYMENT_SERVICES:
                environment.setenv(f"PREFECT_SERVER_SERVICES_{service}_ENABLED", "false")
            url = running.enter_context(own_server(home, free_port()))
        from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
        from prefect.settings import (
            PREFECT_API_URL,
            PREFECT_LOCAL_STORAGE_PATH,
            PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
            temporary_settings,
        )

        root = logging.getLogger()
        root.handlers = [handler for handler in root.handlers if not isinstance(handler, PrefectConsoleHandler)]
        settings = {PREFECT_API_URL: url, PREFECT_LOCAL_STORAGE_PATH: home / "storage"}
        with temporary_settings(settings | {PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}):
            yield url
            APILogWorker.drain_all(timeout=5)


def _empty_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database of a Prefect server, which takes five seconds to make: one for all workers of this session."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # of all workers of this session, and of no other
    file = place / "empty-server" / "prefect.db"
    file.parent.mkdir(exist_ok=True)
    with (file.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            made = file.with_name("made.db")
            environment = {
                "PREFECT_HOME": str(file.parent),
                "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{made}",
            }
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            subprocess.run(command, env=os.environ | environment, umask=0o077, capture_output=True, check=True)
            with contextlib.closing(sqlite3.connect(made)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            made.rename(file)
    return file


@pytest.fixture(scope="session")
def content(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A spec as plain values: the plain pico parent, texts of common words, tiny budgets; `placed` adds the places."""
    place = tmp_path_factory.mktemp("texts")
    for name, documents in (("train", 40), ("held-out", 20)):
        (place / name).mkdir()
        for number in range(documents):
            bend = int(name == "held-out")  # so that no document is in both
            words = [WORDS[(number * 7 + i * (number + 3) + bend * i * i) % len(WORDS)] for i in range(30)]
            (place / name / f"{number:02d}.txt").write_text(" ".join(words))
    outside = {
        "parent": {"path": str(checkpoint_of("llama"))},
        "data": {"train_texts": [str(place / "train")], "held_out_texts": [str(place / "held-out")]},
    }
    return merged(TINY, outside)


def placed(content: dict[str, Any], place: Path) -> dict[str, Any]:
    """The spec with its store, scratch and MLflow under a directory; MLflow is empty where it is not there yet."""
    tracking = place / TRACKING
    if not tracking.exists():
        tracking.parent.mkdir(parents=True)
        shutil.copy(_empty_tracking(), tracking)
    places = {"store": str(place / "store"), "scratch": str(place / "scratch"), "mlflow_uri": f"sqlite:///{tracking}"}
    return merged(content, {"runtime": places})


@functools.cache
def _empty_tracking() -> Path:
    """A new MLflow database: MLflow takes seconds to make one, and a copy takes none."""
    from mlflow import MlflowClient

    directory = Path(_templates.name)
    MlflowClient(f"sqlite:///{directory}/mlflow.db").search_experiments()
    return directory / "mlflow.db"


@pytest.fixture
def spec_of(content: dict[str, Any], tmp_path: Path) -> Callable[..., RunSpec]:
    """A spec with an empty store of its own, and changes by part, for instance `bld={"epochs": 2}`."""
    return lambda **changes: parse_spec(merged(placed(content, tmp_path), changes), "test")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 256 KiB."""
    place = tmp_path / "small-disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk to be had here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="session")
def _finished_run(content: dict[str, Any], prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run, done once per session."""
    from flows.puzzle import puzzle

    done = placed(content, tmp_path_factory.mktemp("finished"))
    spec = parse_spec(done, "test")
    publish_costs(spec)
    recorded = Recorded()
    report = puzzle(spec)
    recorded.task_runs(at_least=60)
    return Finished(done, report, recorded)


@pytest.fixture
def finished(_finished_run: Finished) -> Iterator[Finished]:
    """A whole run; its places are shared, so a test that changes them fails."""
    before = _places(_finished_run)
    yield _finished_run
    assert _places(_finished_run) == before, "the test changed the finished run, which is for reading only"


def _places(run: Finished) -> tuple[dict[str, int], str]:
    """What a run has in its store, and the digest of its MLflow database."""
    database = Path(run.content["runtime"]["mlflow_uri"].removeprefix("sqlite:///"))
    return artifacts(run.content["runtime"]["store"]), hashlib.sha256(database.read_bytes()).hexdigest()


@pytest.fixture
def again(finished: Finished, tmp_path: Path) -> Callable[..., RunSpec]:
    """The spec of the finished run, with changes, over a copy of its store and of its MLflow."""

    def change(**changes: Any) -> RunSpec:
        if not (tmp_path / "store").exists():
            shutil.copytree(finished.content["runtime"]["store"], tmp_path / "store")
            _copy_tracking(Path(finished.content["runtime"]["store"]).parent, tmp_path)
        return parse_spec(merged(placed(finished.content, tmp_path), changes), "test")

    return change


def _copy_tracking(place: Path, to: Path) -> None:
    """Copy MLflow's database and files; the database names the files by absolute URIs."""
    from tasks.tracking.mlflow_client import PLACES

    shutil.copytree((place / TRACKING).parent, (to / TRACKING).parent)
    with contextlib.closing(sqlite3.connect(to / TRACKING)) as database, database:
        for table, column in PLACES:
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(place), str(to)))


@pytest.fixture
def own_environment() -> Iterator[None]:
    """Undo what a test leaves in the environment: commands that run in this process set variables."""
    import tasks.tracking.tracking  # noqa: F401  # an import that sets variables, which have to stay

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def publish_costs(spec: RunSpec) -> None:
    """Put the costs of every batch size into the spec's store: times in proportion to sizes."""
    plan, context = plan_of(spec)

    def timing(size: float) -> Timing:
        return Timing(prefill_ms=size, decode_ms=size / 2, prefill_spread=0.01, decode_spread=0.01)

    def size(variant: Variant) -> float:
        return float(variant.size or 16) * (1 if variant.subblock == "ffn" else 8)

    for work in plan.costs().values():
        times = {str(variant): timing(size(variant)) for variant in work.variants}
        own = plan.inputs.shape.largest_block
        block = times[str(own.attention)].prefill_ms + times[str(own.ffn)].prefill_ms
        record = CostRecord(
            source="measured",
            variants=times,
            outside=timing(10.0),
            parent=timing(10.0 + plan.inputs.shape.layers * block),
            hardware=work.hardware,
            weight_bytes=4,
            kv_bytes=4,
            torch_version="none",
            threads=work.target.threads,
            rounds=work.target.rounds,
        )
        with context.store().staging() as staged:
            context.store().publish(work, record, staged, "a test")


def plan_of(spec: RunSpec) -> tuple[Any, Any]:
    """The plan and the site of a spec."""
    from puzzle_core.plan import Plan
    from tasks.runtime.context import RunContext
    from tasks.stage_tasks import open_inputs

    context = RunContext.of(spec)
    return Plan(spec, open_inputs.fn(context, spec)), context


def write_spec(spec: RunSpec | dict[str, Any], file: Path) -> Path:
    """Write a spec where the command line reads it; JSON is YAML too."""
    values = spec.model_dump(mode="json") if isinstance(spec, RunSpec) else spec
    file.write_text(json.dumps(values))
    return file


def artifacts(store: str | Path) -> dict[str, int]:
    """When each artifact of a local store was written (its record, in ns), by key."""
    records = Path(store).glob("[!.]*/v*/*/record.json")  # and none that is being staged
    return {str(record.parent.relative_to(store)): record.stat().st_mtime_ns for record in records}


def of_stage(keys: Any, stage: str) -> set[str]:
    """The keys of one stage."""
    return {key for key in keys if key.startswith(f"{stage}/")}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Artifacts that are new or were written again; none may be gone."""
    assert before.keys() <= after.keys()
    return {key for key, written in after.items() if before.get(key) != written}


def check_whole(store: str | Path, scratch: Path) -> None:
    """Every artifact of a local store has all files it says it has, and no directory is without a record."""
    from tasks.store.store import Store

    opened = Store(str(store), scratch)
    for key in artifacts(store):
        opened.fetch(key)
    for directory in Path(store).glob("[!.]*/v*/*"):
        assert (directory / "record.json").exists(), directory


def edges(runs: list[Any]) -> dict[str, set[str]]:
    """The names of the task runs that each of these comes after, by its name, without those that stand for flows."""
    names = {run.id: run.name for run in runs}
    return {
        run.name: {names[source.id] for used in run.task_inputs.values() for source in used if source.id in names}
        for run in runs
        if not run.state.state_details.child_flow_run_id
    }


class Recorded:
    """What the server knows of the flow runs that started after a moment; once asked, the answer stays."""

    def __init__(self) -> None:
        self.since = datetime.datetime.now(datetime.UTC)
        self.found: list[Any] = []

    def task_runs(self, at_least: int = 1, ended: bool = True, longest_seconds: float = 120) -> list[Any]:
        """Task runs, once there are as many as expected and all have ended: rows come a moment after the runs."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter

        only = FlowRunFilter.model_validate({"start_time": {"after_": self.since}})
        deadline, before = time.monotonic() + longest_seconds, -1
        with get_client(sync_client=True) as client:
            while not self.found and time.monotonic() < deadline:
                runs = client.read_task_runs(flow_run_filter=only, limit=200)
                final = all(run.state and run.state.is_final() for run in runs)
                if len(runs) == before >= at_least and (final or not ended):
                    self.found = runs
                before = len(runs)
                time.sleep(0.7)
        assert self.found, f"{before} task runs after {longest_seconds} s, where at least {at_least} were expected"
        return self.found

    def computed(self, at_least: int = 1) -> list[str]:
        """Names of the task runs that were not answered from the cache, those that stand for flows left out."""
        runs = [run for run in self.task_runs(at_least) if run.state_name != "Cached"]
        return [run.name for run in runs if not run.state.state_details.child_flow_run_id]
