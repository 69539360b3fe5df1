"""Where runs are tracked, what a moved database finds, and what a lost record means where tracking is required."""

from pathlib import Path

import mlflow
import pytest

from flows.services.prefect_server import free_port
from puzzle_core.errors import SpecError, TrackingError
from puzzle_core.spec import parse_spec
from tasks.tracking import outbox
from tasks.tracking.mlflow_client import MlflowClient, mlflow_client
from tasks.tracking.place import DEFAULT, SERVED, VARIABLE, tracking_uri
from tasks.tracking.tracking import tracked
from tests.workflow import merged, placed


def test_the_specification_comes_before_the_environment_and_that_before_this_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert tracking_uri() == DEFAULT
    SERVED.parent.mkdir()
    SERVED.write_text(f"http://127.0.0.1:{free_port()}")  # of a server that is gone
    assert tracking_uri() == DEFAULT
    monkeypatch.setenv(VARIABLE, "http://team:5000")
    assert tracking_uri() == "http://team:5000"
    assert tracking_uri("sqlite:///own.db") == "sqlite:///own.db"
    monkeypatch.setenv(VARIABLE, "http://me:hidden@team:5000")
    with pytest.raises(SpecError, match="MLFLOW_TRACKING_URI holds credentials") as caught:
        tracking_uri()
    assert "hidden" not in str(caught.value)


def test_a_run_goes_where_the_environment_says(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = placed(content, tmp_path)["runtime"]["mlflow_uri"]
    monkeypatch.setenv(VARIABLE, chosen)
    with tracked("there", parse_spec(merged(content, {"runtime": {"scratch": str(tmp_path)}}), "test")) as run:
        pass
    assert MlflowClient(chosen).get_run(run.run_id).info.run_name == "there"
    assert not (tmp_path / ".puzzle").exists()


def test_a_moved_database_finds_its_artifacts(content, tmp_path):
    spec = parse_spec(placed(content, tmp_path / "before"), "test")
    with tracked("moved", spec) as run:
        run.text("all well", "note.txt")
    (tmp_path / "before").rename(tmp_path / "after")
    uri = spec.runtime.mlflow_uri.replace("before", "after")
    client = mlflow_client(uri)
    assert Path(client.download_artifacts(run.run_id, "note.txt")).read_text() == "all well"
    (tmp_path / "before" / "mlflow" / "mlartifacts").mkdir(parents=True)  # the same again, of another copy
    mlflow_client.cache_clear()
    assert "after" in mlflow_client(uri).get_run(run.run_id).info.artifact_uri


def test_where_tracking_is_required_no_work_begins_without_mlflow(content, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.5)
    runtime = {"mlflow_uri": f"http://127.0.0.1:{free_port()}", "tracking": "required", "scratch": str(tmp_path)}
    begun = []
    with (
        pytest.raises(TrackingError, match=r"does not answer, and runtime.tracking is `required`"),
        tracked("outer", parse_spec(merged(content, {"runtime": runtime}), "test")),
    ):
        begun.append(1)
    assert begun == []


def test_where_tracking_is_required_a_record_that_is_refused_fails_the_run(content, tmp_path):
    values = placed(content, tmp_path)
    required = parse_spec(merged(values, {"runtime": {"tracking": "required"}}), "test")

    def track(spec):
        with tracked("outer", spec), tracked("inner", spec) as run:
            run.params({"width": 1})
            run.params({"width": 2})  # MLflow takes no second value
        return run

    with pytest.raises(TrackingError, match="1 records of this run are not in MLflow"):
        track(required)
    run = track(parse_spec(values, "test"))
    assert mlflow.MlflowClient(required.runtime.mlflow_uri).get_run(run.run_id).info.status == "FINISHED"
