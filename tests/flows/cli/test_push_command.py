"""`puzzle push`: a child and its card arrive at a hub in one commit, or nothing does."""

import pytest

from flows.cli.main import main
from tests.conftest import MIXED


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `puzzle push`: its exit code, and what it said."""
    monkeypatch.setenv("HF_TOKEN", "hf_planted")

    def run(*arguments):
        capsys.readouterr()
        code = main(["push", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_stored_child_arrives_whole_with_a_card_that_says_where_it_comes_from(command, hub, finished):
    store = finished.content["runtime"]["store"]
    from tasks.store.store import Store

    (key,) = Store(store, finished.content["runtime"]["scratch"]).keys("gkd")
    code, said = command(key, "--hub", "org/child", "--store", store)
    assert code == 0, said
    assert said.startswith(f"{hub.endpoint}/org/child/commit/")
    files = dict(hub.pushed["org/child"])
    card = files.pop("README.md").decode()
    directory = Store(store, finished.content["runtime"]["scratch"]).fetch(key)
    assert {"config.json", "model.safetensors", "modeling_puzzle.py", "tokenizer.json"} <= files.keys()
    assert files == {name: (directory / name).read_bytes() for name in files}
    assert "record.json" not in files
    assert card.startswith("---\nlibrary_name: transformers")
    assert 'from_pretrained("org/child", trust_remote_code=True)' in card
    assert f"artifact: `{key}`" in card
    assert "perplexity" in card


def test_a_directory_is_pushed_to_the_endpoint_that_is_named(command, hub, assemble, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, said = command(assemble("llama", MIXED), "--hub", "org/other", "--endpoint", hub.endpoint)
    assert code == 0, said
    assert {"README.md", "model.safetensors"} <= hub.pushed["org/other"].keys()


def test_what_the_hub_refuses_is_said_without_the_token_and_bad_names_before_any_work(command, hub, assemble):
    directory, hub.refuses = assemble("llama", MIXED), True
    code, said = command(directory, "--hub", "org/child")
    assert code == 1
    assert f"the hub at {hub.endpoint} did not take org/child: " in said
    assert "403" in said
    assert "hf_planted" not in said
    assert hub.pushed == {}
    assert "give org/name" in command(directory, "--hub", "child")[1]
    assert "holds credentials" in command(directory, "--hub", "org/child", "--endpoint", "http://me:pw@host")[1]
