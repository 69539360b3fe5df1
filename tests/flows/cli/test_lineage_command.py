"""`puzzle lineage`: a child's way from its parent to exported files, by any of its names, and what of it is gone."""

import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.cli.main import main
from tasks.tracking.tracked_models import KEY_TAG, registered


@pytest.fixture
def child(finished):
    """The logged model of the finished run's child."""
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("puzzle").experiment_id
    (model,) = client.search_logged_models([experiment], "name = 'child-pico'")
    return model


@pytest.fixture
def command(finished, capsys, tmp_path, monkeypatch):
    """Run a subcommand over the finished run's MLflow: its exit code, what it printed, and what it said."""
    uri = finished.content["runtime"]["mlflow_uri"]
    monkeypatch.chdir(tmp_path)

    def run(*arguments, mlflow=uri):
        capsys.readouterr()
        code = main([*map(str, arguments), "--mlflow", mlflow])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_key_leads_from_the_parent_to_the_child(command, child):
    code, shown, _ = command("lineage", child.tags[KEY_TAG])
    assert code == 0
    steps = "parent|block-library|scores|cost-table|architecture|child"
    depth = {found[2]: len(found[1]) for found in re.finditer(rf"(?m)^([ │├└─]*)({steps})\b", shown)}
    assert depth.keys() == set(steps.split("|"))
    assert depth["parent"] < depth["block-library"] < depth["scores"] < depth["architecture"] < depth["child"]
    assert depth["cost-table"] == depth["block-library"]
    assert "also from cost-table costs-this-machine" in shown
    assert re.search(rf"{child.tags[KEY_TAG]}  made 20\S+ by child of pico", shown)
    assert "of its parent's parameters" in shown
    assert re.search(r"all \d+ artifacts are in the store", shown)


def test_names_and_aliases_mean_the_same(command, child):
    ((name, number),) = registered(child)
    wanted = command("lineage", child.tags[KEY_TAG])[1]
    (aliases,) = re.findall(rf"registered as {name} {number} (.*)", wanted)
    assert {"@candidate", "@this-machine-chatbot"} < set(aliases.split())
    assert command("lineage", f"{name}/{number}")[1] == wanted
    assert command("lineage", f"{name}@this-machine-chatbot")[1] == wanted
    assert command("lineage", "this-machine-chatbot")[1] == wanted
    assert command("lineage", child.name)[1].startswith("parent ")


def test_what_is_gone_from_the_store_is_named(command, child, finished, tmp_path):
    store = Path(shutil.copytree(finished.content["runtime"]["store"], tmp_path / "copy"))
    gone = sorted(str(path.relative_to(store)) for path in store.glob("bld/v*/*"))[:7]
    for key in gone:
        shutil.rmtree(store / key)
    code, shown, said = command("lineage", child.tags[KEY_TAG], "--store", store)
    assert code == 1
    assert set(re.findall(r"MISSING in the store: (bld/v\d+/\w+)", shown)) < set(gone)
    assert "MISSING in the store: 2 more" in shown
    assert re.search("the store lacks 7 of the artifacts", said)


def test_a_store_that_cannot_be_looked_at_is_said(command, child, tmp_path):
    code, shown, _ = command("lineage", child.tags[KEY_TAG], "--store", tmp_path / "nowhere")
    assert code == 0
    assert f"the store {tmp_path / 'nowhere'} was not checked" in shown
    assert "MISSING" not in shown


def test_an_unknown_child_is_answered_with_those_that_are_known(command, tmp_path):
    code, shown, said = command("lineage", "nobody")
    assert (code, shown) == (1, "")
    assert "knows no child 'nobody'; it knows child" in said
    code, shown, said = command("lineage", "pico", mlflow="sqlite:///absent.db")
    assert (code, shown) == (1, "")
    assert "there is no MLflow database absent.db" in said
    assert not list(tmp_path.iterdir())


def test_exports_are_noted_once_and_never_fail_on_tracking(command, child, again, tmp_path, caplog):
    key, runtime = child.tags[KEY_TAG], again().runtime
    options = ("export", key, "--store", runtime.store, "--format", "gguf", "--name", "otter")
    for out in ("mine", "again"):
        assert command(*options, "--out", out, mlflow=runtime.mlflow_uri)[0] == 0
    shown = command("lineage", key, mlflow=runtime.mlflow_uri)[1]
    assert shown.count("export child-pico-gguf") == 1
    assert re.search(rf"GGUF in f32, .* MiB\n.*{tmp_path / 'mine'}\n", shown)
    exported = re.search(r"export/\w{40}", shown)[0]
    assert key in command("lineage", exported, mlflow=runtime.mlflow_uri)[1]
    (tmp_path / "mine" / "otter-f32.gguf").unlink()
    (tmp_path / "mine").rmdir()
    assert f"{tmp_path / 'mine'}  (not on this machine)" in command("lineage", key, mlflow=runtime.mlflow_uri)[1]
    caplog.clear()
    code, _, _ = command(*options, "--out", "untracked", mlflow="http://127.0.0.1:9")
    assert code == 0
    assert "the export is not recorded: MLflow does not respond" in caplog.text
    assert (tmp_path / "untracked" / "otter-f32.gguf").exists()
