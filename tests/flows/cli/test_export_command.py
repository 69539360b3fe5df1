"""`puzzle export`: from a directory or a key to what engines read, whole or not at all."""

import json
import re
from pathlib import Path

import pytest
from gguf import GGUFReader

from flows.cli.main import main
from puzzle_core.architecture import Architecture
from puzzle_core.work import AssembleWork, ChildRecord, EvaluateWork, EvaluationRecord, MultipleChoiceResult
from tasks.store.store import Store
from tests.conftest import MIXED


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run `puzzle export` in an empty directory: its exit code, and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = main(["export", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def answered(accuracy):
    """A benchmark's result."""
    others = {"standard_error": 0.03, "accuracy_by_length": 0.3, "standard_error_by_length": 0.03}
    return MultipleChoiceResult(name="arc", items=200, accuracy=accuracy, **others)


@pytest.fixture
def stored(assemble, tmp_path):
    """A child's key in a store that knows its and its parent's evaluation."""
    store, directory = Store(str(tmp_path / "store"), tmp_path / "cache"), assemble("llama", MIXED)
    work = AssembleWork(parent="p", architecture=Architecture.parse(MIXED), library=(), dtype="float32")
    record = ChildRecord(architecture=work.architecture, parameters=1, parameter_bytes=4)
    store.publish(work, record, directory, "merry-otter")
    for child, perplexity in ((work.key, 12.5), (None, 10.25)):
        quality = EvaluationRecord(
            kl_nats_per_token=0.125, lm_loss_nats_per_token=2.5, perplexity=perplexity, top1_accuracy=0.5,
            top1_agreement=0.75, tokens=4096, lm_eval={}, tasks=(answered(5 / perplexity),),
        )  # fmt: skip
        empty = tmp_path / f"empty-{perplexity}"
        empty.mkdir()
        store.publish(EvaluateWork(parent="p", child=child, tokens="t"), quality, empty, "merry-otter")
    return work.key


def test_a_directory_becomes_one_for_engines(command, assemble, tmp_path):
    code, said = command(assemble("llama", MIXED), "--format", "hf", "--out", "mine", "--widths", "any")
    assert code == 0
    assert "DeciLM directory in float32" in said
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names >= {"config.json", "model.safetensors", "README.md", "tokenizer.json", "modeling_decilm.py"}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine" in card
    assert "| 2 | `attn:no_op` | `ffn:no_op` |" in card
    assert "- vLLM: has no linear subblocks (layer 3 ffn:linear, layer 4 attn:linear); fails where the first" in card
    assert "Provenance" not in card


def test_a_key_brings_its_provenance(command, stored, tmp_path):
    code, _ = command(
        stored, "--store", "store", "--format", "hf", "--out", "mine", "--widths", "pad", "--name", "Otter"
    )
    assert code == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "# Otter" in card
    assert f"`{stored}`, made by merry-otter" in card
    assert "| perplexity | 12.5000 | 10.2500 |" in card
    assert "| KL to the parent, nats per token | 0.12500 |  |" in card
    assert "On 4,096 held-out tokens" in card
    assert "| arc, accuracy on 200 items | 0.400 | 0.488 |" in card


@pytest.mark.parametrize(("options", "kind"), [((), "f32"), (("--dtype", "q8_0"), "q8_0")])
def test_gguf_keeps_the_type_or_takes_the_one_asked_for(options, kind, command, assemble, tmp_path):
    code, said = command(assemble("llama", MIXED), "--format", "gguf", "--out", "mine", *options)
    assert code == 0
    assert f"GGUF in {kind}" in said
    fields = GGUFReader(tmp_path / "mine" / f"mine-{kind}.gguf").fields
    assert fields["general.name"].contents() == "mine"
    assert fields["puzzle.architecture"].contents() == list(MIXED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--format", "hf", "--out", "mine"),
            r"FFN widths must be multiples of 256 \(layer 0 ffn:i24, layer 4 ffn:i48\)",
        ),
        (("--format", "hf", "--out", "mine", "--dtype", "q8_0"), "--dtype q8_0 is of --format gguf"),
    ],
)
def test_what_cannot_be_leaves_nothing_behind(arguments, message, command, assemble, tmp_path):
    (tmp_path / "there").mkdir()
    code, said = command(assemble("llama", MIXED), *arguments)
    assert code == 1
    assert re.search(message, said)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "there"), '--out. "there" already exists'),
        (("--out", "mine", "--name", "../../mine"), "'../../mine' is a path"),
        (("--out", "mine", "--name", "/tmp/mine"), "'/tmp/mine' is a path"),
    ],
)
def test_wrong_usage_leaves_nothing_behind(arguments, message, command, assemble, tmp_path):
    (tmp_path / "there").mkdir()
    code, printed = command(assemble("llama", MIXED), "--format", "gguf", *arguments)
    assert (code, message in printed) == (2, True), printed
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("child", ["nowhere", "child/v1/" + "0" * 40])
def test_a_child_that_is_not_there_is_named(child, command):
    code, said = command(child, "--format", "gguf", "--out", "mine")
    assert code == 1
    assert child in said
    assert not Path("mine").exists()


def test_the_parent_can_be_exported_too(command, checkpoint_of, tmp_path):
    code, _ = command(checkpoint_of("llama"), "--format", "hf", "--widths", "any", "--out", "mine")
    assert code == 0
    entries = json.loads((tmp_path / "mine" / "config.json").read_text())["block_configs"]
    assert [entry["ffn"]["intermediate_size"] for entry in entries] == [48] * 5
