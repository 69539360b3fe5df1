"""Tracking in MLflow: nested runs, what they say, and lineage; and a run goes on where MLflow does not."""

import concurrent.futures
import logging
import time

import pytest
from mlflow import MlflowClient

from puzzle_core.spec import parse_spec
from tasks.process import this_process
from tasks.tracking import KEY_TAG, PROCESS_TAG, bury_runs, tracked


@pytest.fixture(scope="module")
def tracked_spec(content):
    return parse_spec(content | {"name": "tracked"}, "test")


@pytest.fixture(scope="module")
def client(tracked_spec):
    return MlflowClient(tracked_spec.runtime.mlflow_uri)


@pytest.fixture
def run_of(client):
    """MLflow's own view of a tracked run."""
    return lambda run: client.get_run(run.run_id)


def test_runs_are_nested_as_flows_are(tracked_spec, run_of):
    with tracked("outer", tracked_spec) as outer, tracked("library", tracked_spec) as library:
        with tracked("inner", tracked_spec) as inner:
            pass
        with tracked("beside", tracked_spec) as beside:
            pass
    parents = [run_of(run).data.tags.get("mlflow.parentRunId") for run in (outer, library, inner, beside)]
    assert parents == [None, outer.run_id, library.run_id, library.run_id]
    assert [run_of(run).info.run_name for run in (outer, inner)] == ["outer", "inner"]
    assert run_of(inner).info.experiment_id == run_of(outer).info.experiment_id


def test_the_outermost_run_has_the_whole_spec_as_params(tracked_spec, run_of):
    with tracked("outer", tracked_spec) as outer, tracked("inner", tracked_spec) as inner:
        pass
    params = run_of(outer).data.params
    assert params["bld.optimizer.learning_rate"] == str(tracked_spec.bld.optimizer.learning_rate)
    assert params["variants.kv_heads"] == "[2]"
    assert "bld.tokens" not in run_of(inner).data.params
    assert run_of(inner).data.params["spec_digest"] == tracked_spec.digest()


def test_a_run_ends_as_its_flow_did(tracked_spec, run_of):
    runs = []

    def fail(error):
        with tracked("failing", tracked_spec) as run:
            runs.append(run)
            raise error

    with tracked("well", tracked_spec) as run:
        assert run_of(run).info.status == "RUNNING"
        runs.append(run)
    for error in (ValueError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert [run_of(run).info.status for run in runs] == ["FINISHED", "FAILED", "KILLED"]


def test_runs_of_a_process_that_is_gone_are_closed_as_the_next_run_begins_and_those_of_others_are_left(
    tracked_spec, client
):
    with tracked("well", tracked_spec) as run:
        here = client.get_run(run.run_id)
    host, *rest, started = here.data.tags[PROCESS_TAG].split()
    assert here.data.tags[PROCESS_TAG] == this_process()
    processes = {
        "living": this_process(),
        "gone": " ".join((host, *rest, "1")),
        "elsewhere": " ".join(("another-host", *rest, started)),
        "unknown": "",
    }
    planted = {
        name: client.create_run(here.info.experiment_id, tags={PROCESS_TAG: process}).info.run_id
        for name, process in processes.items()
    }
    within = {"mlflow.parentRunId": planted["gone"], PROCESS_TAG: processes["gone"]}
    planted["within the gone"] = client.create_run(here.info.experiment_id, tags=within).info.run_id
    with tracked("next", tracked_spec):
        statuses = {name: client.get_run(run).info.status for name, run in planted.items()}
    expected = dict.fromkeys(planted, "RUNNING") | {"gone": "KILLED", "within the gone": "KILLED"}
    assert statuses == expected
    client.update_run(planted["gone"], "RUNNING")
    bury_runs(tracked_spec.runtime.mlflow_uri)
    assert {name: client.get_run(run).info.status for name, run in planted.items()} == expected
    for run in planted.values():
        client.set_terminated(run)


def test_runs_that_start_at_once_make_one_database_and_half_a_one_of_a_killed_run_is_made_anew(content, tmp_path):
    (tmp_path / ".mlflow.db.new").write_bytes(b"half a database")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    spec = parse_spec(content | {"name": "at-once", "runtime": {"mlflow_uri": uri}}, "test")
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        runs = list(threads.map(lambda number: start_and_end(f"run {number}", spec), range(3)))
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert len(experiments) == 2  # MLflow's own and ours
    assert {run.info.run_id for run in client.search_runs(experiments)} == set(runs)
    assert [file.name for file in tmp_path.glob(".mlflow.db.new*")] == []


def start_and_end(name, spec):
    with tracked(name, spec) as run:
        return run.run_id


def test_metrics_keep_their_steps_however_many(tracked_spec, client):
    with tracked("metrics", tracked_spec) as run:
        run.metrics([("bld_loss/ffn:i24", layer / 10, layer) for layer in range(1001)])
        run.metrics([("kl/attn:kv2+ffn:no_op", 0.5, 3)])
    history = client.get_metric_history(run.run_id, "bld_loss/ffn-i24")
    assert sorted((metric.step, metric.value) for metric in history) == [(n, n / 10) for n in range(1001)]
    assert [metric.step for metric in client.get_metric_history(run.run_id, "kl/attn-kv2 ffn-no_op")] == [3]


def test_artifacts_are_uploaded(tracked_spec, client, tmp_path):
    (tmp_path / "report.md").write_text("all well")
    with tracked("artifacts", tracked_spec) as run:
        run.artifacts(tmp_path, "report")
    assert [file.path for file in client.list_artifacts(run.run_id, "report")] == ["report/report.md"]


def test_a_model_is_logged_once_per_key_and_is_an_output_of_every_run_that_made_it(tracked_spec, client):
    ids, outputs = [], []
    for _ in range(2):
        with tracked("making", tracked_spec) as run:
            ids.append(run.makes("child", "child-tracked", "gkd/v1/once", {"size": 3}))
        outputs += [model.model_id for model in client.get_run(run.run_id).outputs.model_outputs]
    assert ids[0] == ids[1] is not None
    assert outputs == ids
    with tracked("making another", tracked_spec) as run:
        assert run.makes("child", "child-tracked", "gkd/v1/other", {}) != ids[0]
    model = client.get_logged_model(ids[0])
    assert model.tags[KEY_TAG] == model.params["key"] == "gkd/v1/once"
    assert (model.params["size"], model.model_type) == ("3", "child")


def test_models_that_are_used_are_inputs(tracked_spec, client):
    with tracked("making", tracked_spec) as maker:
        made = maker.makes("parent", "parent", "parent/used", {})
    with tracked("using", tracked_spec) as user:
        user.uses(made, None)
    assert [model.model_id for model in client.get_run(user.run_id).inputs.model_inputs] == [made]
    assert client.get_run(user.run_id).outputs.model_outputs == []


def test_from_the_child_one_gets_back_to_architecture_library_and_parent(finished):
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("puzzle").experiment_id
    child = client.search_logged_models([experiment], filter_string="name = 'child-pico'")[0]

    def made_from(model):
        inputs = client.get_run(model.source_run_id).inputs.model_inputs
        return {found.model_type: found for found in (client.get_logged_model(used.model_id) for used in inputs)}

    sources = made_from(child)
    assert set(sources) == {"parent", "block-library", "architecture"}
    assert sources["parent"].params["path"] == finished.content["parent"]["path"]
    assert child.params["architecture"] == sources["architecture"].params["key"]
    assert child.params["library"] == sources["block-library"].params["key"]
    library = made_from(sources["architecture"])["block-library"]
    assert library.model_id == sources["block-library"].model_id
    assert made_from(library)["parent"].model_id == sources["parent"].model_id


def test_a_run_goes_on_where_mlflow_cannot_be_reached_and_says_so(content, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    spec = parse_spec(content | {"runtime": {"mlflow_uri": "http://127.0.0.1:9"}}, "test")
    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, "puzzle"),
        tracked("unreachable", spec) as run,
        tracked("inner", spec) as inner,
    ):
        run.params({"a": 1})
        run.metrics([("loss", 1.0, 0)])
        inner.uses("m-1")
        assert inner.makes("child", "child", "key", {}) is None
    assert "MLflow at http://127.0.0.1:9 cannot be reached, the run goes on without it" in caplog.text
    assert len(caplog.records) == 1
    assert time.monotonic() - started < 5


def test_a_record_that_mlflow_does_not_take_is_said_and_stops_nothing(tracked_spec, caplog):
    with caplog.at_level(logging.WARNING, "puzzle"), tracked("refused", tracked_spec) as run:
        run.params({"twice": 1})
        run.params({"twice": 2})
        run.params({"after": 3})
    assert "did not take a record" in caplog.text
