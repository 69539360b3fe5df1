"""Tracking in MLflow: nested runs, what they say, and lineage; and a run goes on where MLflow does not."""

import concurrent.futures
import csv
import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from flows.train_child import train_child
from puzzle_core.spec import RuntimeSpec, ScenarioSpec, TargetSpec, parse_spec
from tasks.runtime.process import this_process
from tasks.tracking import lineage_tree, outbox
from tasks.tracking.lineage_steps import TABLE
from tasks.tracking.mlflow_client import PROCESS_TAG, end_orphaned_runs, mlflow_client
from tasks.tracking.tracked_models import (
    FROM_TAG,
    KEY_TAG,
    NOTE_TAG,
    TrackedModel,
    Version,
    alias_of,
    note_model,
    registered,
)
from tasks.tracking.tracking import tracked
from tests.workflow import SCORED, TRAINED, artifacts, of_stage, placed


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine may need more than 15 s for a new database; that MLflow does not answer fails before that."""
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 200.0)


@pytest.fixture
def tracked_spec(content, tmp_path):
    return parse_spec(placed(content, tmp_path) | {"name": "tracked"}, "test")


@pytest.fixture
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
    end_orphaned_runs(tracked_spec.runtime.mlflow_uri)
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


def test_a_task_in_another_process_writes_to_the_same_run(tracked_spec, client):
    with tracked("metrics", tracked_spec) as run:
        code = "import sys; from tasks.tracking import outbox; outbox.FLUSH_SECONDS = 200.0; "
        code += "from tasks.tracking.tracked_run import TrackedRun, outbox_of; "
        code += "run = TrackedRun.model_validate_json(sys.argv[1]); run.metrics([('gkd/loss', 0.5, 7)]); "
        code += "sys.exit(not outbox_of(run.uri).flush())"
        subprocess.run([sys.executable, "-c", code, run.model_dump_json()], check=True, cwd=Path(__file__).parents[3])
    assert [metric.step for metric in client.get_metric_history(run.run_id, "gkd/loss")] == [7]


def test_artifacts_are_uploaded(tracked_spec, client, tmp_path):
    directory = tmp_path / "report"
    directory.mkdir()
    (directory / "report.md").write_text("all well")
    with tracked("artifacts", tracked_spec) as run:
        run.artifacts(directory, "report")
    assert [file.path for file in client.list_artifacts(run.run_id, "report")] == ["report/report.md"]


def test_a_model_is_logged_once_per_key_and_is_an_output_of_every_run_that_made_it(tracked_spec, client):
    child, outputs, made = TrackedModel("child", "child-tracked", "gkd/v1/once", about={"size": 3}), [], []
    for _ in range(2):
        with tracked("making", tracked_spec) as run:
            run.makes(child)
        made.append(run.run_id)
        outputs += [model.model_id for model in client.get_run(run.run_id).outputs.model_outputs]
    assert outputs[0] == outputs[1]
    with tracked("making another", tracked_spec) as run:
        run.makes(TrackedModel("child", "child-tracked", "gkd/v1/other"))
    (other,) = client.get_run(run.run_id).outputs.model_outputs
    assert other.model_id != outputs[0]
    model = client.get_logged_model(outputs[0])
    assert model.tags[KEY_TAG] == model.params["key"] == "gkd/v1/once"
    assert (model.params["size"], model.model_type, model.source_run_id) == ("3", "child", made[0])
    assert str(model.status) == "READY"


def test_models_that_are_used_are_inputs_and_made_by_no_run(tracked_spec, client):
    with tracked("using", tracked_spec) as user:
        user.uses(TrackedModel("parent", "parent", "parent/used"))
    (used,) = client.get_run(user.run_id).inputs.model_inputs
    assert client.get_run(user.run_id).outputs.model_outputs == []
    assert client.get_logged_model(used.model_id).source_run_id is None


def test_models_link_to_what_they_were_made_from_and_to_what_was_made_from_them(tracked_spec, client):
    steps = [("parent", ()), ("library", ("parent/x",)), ("scores", ("library/x", "parent/x"))]
    with tracked("linking", tracked_spec) as run:
        for kind, sources in steps:
            run.makes(TrackedModel(kind, kind, f"{kind}/x", sources, headline=f"about {kind}"))
    made = [client.get_logged_model(model.model_id) for model in client.get_run(run.run_id).outputs.model_outputs]
    models = {model.name: model for model in made}
    assert models["scores"].tags[FROM_TAG] == "library/x parent/x"
    place = f"(#/experiments/{models['library'].experiment_id}/models/{{}})"
    before, after = models["library"].tags[NOTE_TAG].split("Led to:")
    assert before.startswith("about library")
    assert place.format(models["parent"].model_id) in before
    assert place.format(models["scores"].model_id) in after
    with tracked("another source", tracked_spec) as again:
        again.makes(TrackedModel("scores", "scores", "scores/x", ("library/y",)))
    assert client.get_logged_model(models["scores"].model_id).tags[FROM_TAG] == "library/x parent/x library/y"


def test_files_and_curve_are_given_once_and_again_if_that_failed(tracked_spec, client):
    asked, steps = [], []

    def files():
        asked.append(1)
        if len(asked) <= 2:  # the outbox tries twice
            raise OSError("no store")
        return {"artifacts.csv": "stage,key"}

    def curve():
        return [("gkd/loss", 1.0 / step, step) for step in (1, 2, 3)]

    model = TrackedModel("child", "child-late", "gkd/v1/late", files=files, curve=curve)
    for status in ("PENDING", "READY", "READY"):
        with tracked("trying", tracked_spec) as run:
            run.metrics([("gkd/loss", 1.0, 1)])  # known from live
            run.makes(model)
        (made,) = client.get_run(run.run_id).outputs.model_outputs
        assert str(client.get_logged_model(made.model_id).status) == status
        steps.append(sorted(metric.step for metric in client.get_metric_history(run.run_id, "gkd/loss")))
    assert steps == [[1, 2, 3], [1, 2, 3], [1]]
    assert len(asked) == 3
    assert [file.path for file in client.list_logged_model_artifacts(made.model_id)] == ["artifacts.csv"]


def test_a_child_is_one_version_and_an_alias_names_the_newest_answer(tracked_spec, client):
    def make(key, alias):
        with tracked("registering", tracked_spec) as run:
            run.makes(
                TrackedModel("child", "child", key),
                Version("puzzle-family", "children", alias, f"of {key}", {"puzzle.x": "1"}),
            )

    def named(alias):
        version = client.get_model_version_by_alias("puzzle-family", alias)
        return version.tags[KEY_TAG], str(version.version)

    make("gkd/v1/a", "h100-chat")
    assert named("h100-chat") == ("gkd/v1/a", "1")
    make("gkd/v1/b", "h100-chat")
    make("gkd/v1/a", "l4-chat")
    assert (named("h100-chat"), named("l4-chat")) == (("gkd/v1/b", "2"), ("gkd/v1/a", "1"))
    make("gkd/v1/a", "h100-chat")  # a second run of an older answer
    assert named("h100-chat") == ("gkd/v1/b", "2")
    versions = client.search_model_versions("name = 'puzzle-family'")
    about = sorted((str(v.version), v.description.split("\n")[0], v.tags["puzzle.x"]) for v in versions)
    assert about == [("1", "of gkd/v1/a", "1"), ("2", "of gkd/v1/b", "1")]
    client.create_model_version(
        "puzzle-family", versions[0].source, run_id=versions[0].run_id, tags={KEY_TAG: "gkd/v1/a"}
    )
    make("gkd/v1/a", "l4-chat")  # as when two runs at once have registered it
    assert len(client.search_model_versions("name = 'puzzle-family'")) == 2
    version = client.get_model_version("puzzle-family", "2")
    made = client.get_run(version.run_id).outputs.model_outputs[0].model_id
    assert f"/models/{made})" in version.description
    assert "#/models/puzzle-family/versions/2" in client.get_logged_model(made).tags[NOTE_TAG]


def test_two_pairs_of_names_never_share_an_alias_and_mlflow_takes_each(tmp_path):
    names = ["a", "b", "a-b", "a--b", "a-", "a_b", "a_2db", "a b", "a.b", "a+b", "A", "latest", "v1", "7b v2.1"]
    names += ["x" * 99, "x" * 100, ("-" * 50).join("ab"), ("." * 98).join("ab"), (" " * 98).join("ab")]
    pairs = [(target, scenario) for target in names for scenario in names]
    for name in names:
        assert (TargetSpec(name=name).name, ScenarioSpec(name=name).name) == (name, name)
    aliases = {alias_of(*pair): pair for pair in pairs}
    assert len(aliases) == len(pairs)
    assert alias_of("this-machine", "chatbot") == "this-machine-chatbot"
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("puzzle-family")
    version = client.create_model_version("puzzle-family", str(tmp_path)).version
    for alias in (*list(aliases)[:: len(names) + 1], max(aliases, key=len)):
        client.set_registered_model_alias("puzzle-family", alias, version)
        client.set_model_version_tag("puzzle-family", version, f"puzzle.answer.{alias}", "yes")
        assert str(client.get_model_version_by_alias("puzzle-family", alias).version) == str(version)


def test_the_outermost_run_has_the_spec_as_a_file_and_what_the_machine_did(tracked_spec, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with tracked("outer", tracked_spec) as outer, tracked("inner", tracked_spec) as inner:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not client.get_run(outer.run_id).data.metrics:
            time.sleep(0.2)
    assert client.get_run(outer.run_id).data.metrics["system/system_memory_usage_percentage"] > 0
    assert client.get_run(inner.run_id).data.metrics == {}
    file = client.download_artifacts(outer.run_id, "spec.yaml")
    values = yaml.safe_load(Path(file).read_text())
    assert parse_spec(values, "test") == tracked_spec.model_copy(update={"runtime": RuntimeSpec()})
    assert client.list_artifacts(inner.run_id) == []


def test_from_the_child_one_gets_back_to_architecture_library_and_parent(finished):
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("puzzle").experiment_id
    (child,) = client.search_logged_models([experiment], filter_string="name = 'child-pico'")

    def made_from(model):
        inputs = client.get_run(model.source_run_id).inputs.model_inputs
        return {found.model_type: found for found in (client.get_logged_model(used.model_id) for used in inputs)}

    sources = made_from(child)
    assert set(sources) == {"parent", "block-library", "scores", "cost-table", "architecture"}
    assert sources["parent"].params["path"] == finished.content["parent"]["path"]
    assert child.params["architecture"] == sources["architecture"].params["key"]
    assert child.params["library"] == sources["block-library"].params["key"]
    library = made_from(sources["architecture"])["block-library"]
    assert library.model_id == sources["block-library"].model_id
    assert made_from(library)["parent"].model_id == sources["parent"].model_id


@pytest.fixture
def runs(finished):
    """MLflow's runs of the finished flow, by name, and a client."""
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("puzzle").experiment_id
    (whole,) = client.search_runs([experiment], "attributes.run_name = 'pico'")
    within = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{whole.info.run_id}'")
    return client, {run.info.run_name: run for run in (whole, *within)}


def rows(file):
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))


def test_a_run_names_its_texts_and_where_every_artifact_lies(finished, runs):
    client, found = runs
    contexts = {
        name: sorted(tag.value for used in run.inputs.dataset_inputs for tag in used.tags)
        for name, run in found.items()
    }
    assert contexts["pico"] == ["bld", "calibration", "evaluation", "gkd", "scoring"]
    assert contexts["library"] == ["bld", "calibration", "scoring"]
    assert contexts["child"] == ["evaluation", "gkd"]
    store = Path(finished.content["runtime"]["store"])
    table = rows(client.download_artifacts(found["pico"].info.run_id, TABLE))
    assert {row["key"] for row in table} == artifacts(store).keys()
    for row in table:
        record = Path(row["uri"]) / "record.json"
        assert record.parent == store.resolve() / row["key"]
        assert hashlib.sha256(record.read_bytes()).hexdigest() == row["sha256_of_record"]


def test_curves_are_whole_and_kl_is_by_layer(finished, runs):
    client, found = runs
    store, child = Path(finished.content["runtime"]["store"]), found["child"].info.run_id
    (made,) = found["child"].outputs.model_outputs
    record = json.loads((store / client.get_logged_model(made.model_id).params["key"] / "record.json").read_text())
    curve = sorted(client.get_metric_history(child, "gkd/loss"), key=lambda metric: metric.step)
    assert [metric.value for metric in curve] == [terms["loss"] for terms in record["record"]["curve"]]
    library = found["library"].info.run_id
    names = [name for name in found["library"].data.metrics if name.startswith("bld/")]
    assert len(names) == TRAINED
    assert [metric.step for metric in client.get_metric_history(library, names[0])] == [1, 2, 3, 4]
    scenario = finished.content["scenario"]
    limits = [name for run in found.values() for name in run.data.metrics if name.startswith("limit/")]
    assert sorted(limits) == sorted(f"limit/{ScenarioSpec().name}/{name}" for name in scenario["limits"])
    by_layer = [name for name in found["library"].data.metrics if name.startswith("kl/")]
    assert sum(len(client.get_metric_history(library, name)) for name in by_layer) == SCORED


def test_the_child_is_registered_with_a_card_and_a_second_run_makes_no_second_version(finished, runs, again):
    client, found = runs
    (made,) = found["child"].outputs.model_outputs
    child = client.get_logged_model(made.model_id)
    ((name, number),) = registered(child)
    version = client.get_model_version(name, number)
    assert version.run_id == found["child"].info.run_id
    assert float(version.tags["puzzle.parameters_ratio"]) < 0.9
    assert version.description.startswith("The child after GKD has ")
    place = Path(child.artifact_location.removeprefix("file://"))
    card = (place / "README.md").read_text()
    assert child.params["architecture"] in card
    assert "| perplexity |" in card
    assert {row["stage"] for row in rows(place / TABLE)} == {"tokens", "gkd", "evaluation", "timing"}
    spec = again()
    train_child(spec)
    client = MlflowClient(spec.runtime.mlflow_uri)
    assert [str(version.version) for version in client.search_model_versions(f"name = '{name}'")] == [str(number)]
    assert str(client.get_model_version_by_alias(name, "this-machine-chatbot").version) == str(number)


def test_a_run_goes_on_where_only_its_lineage_lacks_an_artifact(again, caplog):
    spec = again()
    gone = min(of_stage(artifacts(spec.runtime.store), "score"))
    shutil.rmtree(Path(spec.runtime.store) / gone)
    with caplog.at_level(logging.WARNING, "puzzle"):
        train_child(spec)
    assert f"the lineage of this run in MLflow is incomplete: {gone} is not in the store" in caplog.text


def test_a_run_goes_on_where_mlflow_cannot_be_reached_and_says_so(content, caplog, tmp_path):
    runtime = {"mlflow_uri": "http://127.0.0.1:11", "scratch": str(tmp_path)}
    spec = parse_spec(content | {"runtime": runtime}, "test")
    with (
        caplog.at_level(logging.WARNING, "puzzle"),
        tracked("unreachable", spec) as run,
        tracked("inner", spec) as inner,
    ):
        run.params({"a": 1})
        run.metrics([("loss", 1.0, 0)])
        inner.uses(TrackedModel("parent", "parent", "parent/none"))
    *cannot, lost = [record.getMessage() for record in caplog.records if record.name == "puzzle"]
    said = "MLflow at http://127.0.0.1:11 cannot be reached, the run goes on without it"
    assert all(line.startswith(said) for line in cannot)  # a busy machine may not have found out before the end
    assert re.match(r"\d+ records of this run are not in MLflow at http://127.0.0.1:11: run it again", lost)
    assert len(list(tmp_path.rglob("*.json"))) == 1  # a word to the next run


def test_a_record_that_mlflow_does_not_take_is_said_and_stops_nothing(tracked_spec, caplog, client):
    with caplog.at_level(logging.WARNING, "puzzle"), tracked("refused", tracked_spec) as run:
        run.params({"twice": 1})
        run.params({"twice": 2})
        run.params({"after": 3} | {f"many.{number}": number for number in range(150)})
    assert "did not take a record" in caplog.text
    assert client.get_run(run.run_id).data.params["after"] == "3"
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("name", ["llama-3.1-8b", "a:b", "50%", "export/x", "7b.v2.1", "\u6a21\u578b"])
def test_a_child_of_any_name_is_recorded_and_found_by_it(tmp_path, name):
    client = mlflow_client(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("names")
    child = TrackedModel(kind="child", name=f"child-{name}", key="gkd/v1/a")
    logged = note_model(client, experiment, child, None)
    assert note_model(client, experiment, child, None).model_id == logged.model_id
    for asked in (name, f"child-{name}"):
        found = lineage_tree.find_child(client, [logged], asked)
        assert found is not None
        assert found.tags[KEY_TAG] == "gkd/v1/a"
    assert lineage_tree.find_child(client, [logged], "another") is None
