"""Children in MLflow's registry: they load and give the child's logits, nothing is copied, champions have a rule."""

import json
import os
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from flows.cli.main import main
from puzzle_core.architecture import Architecture
from puzzle_core.model.child import load_child
from puzzle_core.spec import parse_spec
from puzzle_core.work import AssembleWork, ChildRecord
from tasks.runtime.context import RunContext
from tasks.runtime.software import software
from tasks.store.garbage import Inventory
from tasks.tracking.loadable import Checkpoint, local_directory
from tasks.tracking.tracked_models import KEY_TAG, TrackedModel, Version
from tasks.tracking.tracking import tracked
from tests.conftest import CPU, MIXED
from tests.workflow import placed

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def tracking_uri(monkeypatch):
    """Set the URI that MLflow's loaders read from the environment."""

    def choose(uri):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return MlflowClient()

    return choose


def logits_of(directory):
    with torch.no_grad():
        return load_child(directory, torch.float32, CPU)(input_ids=torch.tensor(IDS)).logits.numpy()


def test_the_champion_of_a_run_loads_and_gives_the_childs_logits(finished, tracking_uri):
    client = tracking_uri(finished.content["runtime"]["mlflow_uri"])
    (family,) = client.search_registered_models()
    assert family.aliases.keys() == {
        "candidate",
        "champion",
        "this-machine-chatbot",
        "champion-this-machine-chatbot",
    }
    model = f"models:/{family.name}@champion"
    context = RunContext.model_validate({"parent": finished.content["parent"], "runtime": finished.content["runtime"]})
    version = client.get_model_version_by_alias(family.name, "champion")
    child = context.store().fetch(version.tags[KEY_TAG])
    wanted = logits_of(child)

    loaded = mlflow.pyfunc.load_model(model)
    assert np.array_equal(loaded.predict({"input_ids": IDS}), wanted)
    assert loaded.metadata.signature.inputs.input_names() == ["input_ids"]
    assert loaded.metadata.metadata["commit"] == (software().commit or "")
    assert set(loaded.predict(loaded.input_example).shape[:2]) == {1, 8}
    pipeline = mlflow.transformers.load_model(model)
    with torch.no_grad():
        assert np.array_equal(pipeline.model(input_ids=torch.tensor(IDS)).logits.numpy(), wanted)
    assert pipeline("the width of", max_new_tokens=2)[0]["generated_text"].startswith("the width of")

    place = Path(mlflow.artifacts.download_artifacts(model))
    assert place == local_directory(version.source)
    files = {path.relative_to(child) for path in child.rglob("*") if path.is_file()} - {Path("record.json")}
    assert files
    for file in files:
        assert os.path.samefile(place / file, child / file)
    requirements = (place / "requirements.txt").read_text()
    assert f"transformers=={software().versions['transformers']}" in requirements


def test_results_are_metrics_of_the_child_on_the_texts_of_its_evaluation(finished):
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("puzzle").experiment_id
    (child,) = client.search_logged_models([experiment], "name = 'child-pico'")
    metrics = {metric.key: metric for metric in child.metrics}
    assert {"perplexity", "top1_accuracy", "parameters_ratio", "kl_nats_per_token"} <= metrics.keys()
    datasets = {used.dataset.digest: used.tags for used in client.get_run(child.source_run_id).inputs.dataset_inputs}
    (split,) = datasets[metrics["perplexity"].dataset_digest]
    assert split.value == "evaluation"


@pytest.fixture
def child_dir(assemble):
    return assemble("llama", MIXED)


def make(store, child_dir, spec, champion=False, key_seed="a"):
    """Publish a child's directory under a key of its own, and register it as a run does."""
    work = AssembleWork(parent=key_seed, architecture=Architecture.parse(MIXED), library=(), dtype="float32")
    with store.staging() as staged:
        for file in child_dir.iterdir():
            (staged / file.name).write_bytes(file.read_bytes())
        record = ChildRecord(architecture=work.architecture, parameters=1, parameter_bytes=4)
        store.publish(work, record, staged, "a test")
    child = TrackedModel("child", "child", work.key, checkpoint=Checkpoint(store, work.key))
    with tracked("making", spec) as run:
        run.makes(child, Version("puzzle-family", "children", "l4-chat", "a child", {}, is_champion=champion))
    return work.key


def test_with_a_bucket_the_source_is_the_childs_place_and_no_file_of_mlflows_is_a_stray(
    opened, child_dir, content, tmp_path, tracking_uri
):
    spec, store = parse_spec(placed(content, tmp_path), "test"), opened()
    key = make(store, child_dir, spec)
    client = tracking_uri(spec.runtime.mlflow_uri)
    version = client.get_model_version_by_alias("puzzle-family", "candidate")
    assert version.source == f"{store.url}/{key}/{store.manifest(key).place}"
    loaded = mlflow.pyfunc.load_model("models:/puzzle-family@candidate")
    assert np.array_equal(loaded.predict({"input_ids": IDS}), logits_of(child_dir))
    inventory = Inventory.of(opened())
    assert inventory.strays == {}
    store.delete(key)
    assert opened().listing() == {}


def test_champions_are_made_by_the_gate_or_by_hand_and_no_older_answer_takes_their_place(
    child_dir, content, tmp_path, capsys
):
    spec = parse_spec(placed(content, tmp_path), "test")
    store, client = RunContext.of(spec).store(), MlflowClient(spec.runtime.mlflow_uri)
    keys = [make(store, child_dir, spec, champion, key_seed) for key_seed, champion in (("a", True), ("b", False))]

    def named(alias):
        return client.get_model_version_by_alias("puzzle-family", alias).tags[KEY_TAG]

    assert [named(alias) for alias in ("champion", "champion-l4-chat", "candidate", "l4-chat")] == [
        keys[0],
        keys[0],
        keys[1],
        keys[1],
    ]
    assert main(["promote", keys[1], "--mlflow", spec.runtime.mlflow_uri]) == 0
    assert capsys.readouterr().out.split() == [
        "models:/puzzle-family@champion",
        "models:/puzzle-family@champion-l4-chat",
    ]
    assert named("champion") == named("champion-l4-chat") == keys[1]
    make(store, child_dir, spec, True, "a")
    assert named("champion") == keys[1]
    assert main(["promote", keys[1], "--mlflow", spec.runtime.mlflow_uri, "--answers", "h100-chat"]) == 1
    assert "answers l4-chat, and h100-chat was named" in capsys.readouterr().err


def test_the_example_is_json_as_mlflow_serves_it(finished):
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    (version,) = client.search_model_versions("name like 'puzzle-%'")
    place = local_directory(version.source)
    assert json.loads((place / "input_example.json").read_text()) == {"input_ids": [list(range(8))]}
