"""Parents from a hub: a real client against a small hub of our own, and tokenizers that are code of the checkpoint."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ParentError
from puzzle_core.model.child import write_description
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from tests.hub import MODEL
from tests.pico import edit_tensors

ALLOWED = "tokenization_reversed.Reversed"
CODE = """
from transformers import PreTrainedTokenizerFast

class Reversed(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        found = super().__call__(text, **options)
        found["input_ids"] = found["input_ids"][::-1]
        return found
"""


@pytest.fixture
def coded(copy_of):
    """A parent whose tokenizer is code of its own, which is seen in what it gives: the ids come in reverse."""
    directory = copy_of("llama")
    (directory / "tokenization_reversed.py").write_text(CODE)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": [None, ALLOWED]},
        "tokenizer_class": "Reversed",
    }
    file.write_text(json.dumps(settings))
    return directory


@pytest.fixture(autouse=True)
def own_code_cache(tmp_path, monkeypatch):
    """Code of checkpoints is copied by transformers to a place of this test's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def hub(hub, coded):
    """The hub with that parent."""
    hub.push(coded)
    return hub


def test_a_parent_of_the_hub_is_the_one_in_the_directory(hub, coded):
    parent = Parent(ParentSpec(path=MODEL))
    assert parent.digest == Parent(ParentSpec(path=str(coded))).digest
    assert parent.directory.name == hub.main
    assert hub.downloads["model.safetensors"] == 1


def test_the_same_weights_in_other_files_stay_on_the_hub(hub, coded):
    others = {"consolidated.safetensors", "params.json", "optimizer.safetensors"}
    for name in others:
        (coded / name).write_bytes(b"x")
    Parent(ParentSpec(path=MODEL))
    assert hub.downloads["model.safetensors"] == hub.downloads["config.json"] == 1
    assert not hub.downloads.keys() & others


def test_the_shards_of_an_index_are_fetched_by_their_names(hub, coded):
    names = load_file(coded / "model.safetensors").keys()
    (coded / "model.safetensors").rename(coded / "weights-a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "weights-a.safetensors")}
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Parent(ParentSpec(path=MODEL)).digest == Parent(ParentSpec(path=str(coded))).digest
    assert hub.downloads["weights-a.safetensors"] == 1


def test_one_file_of_weights_counts_before_shards_as_it_does_in_a_directory(hub, coded):
    """A fine-tuned model that was saved into the folder of its base model."""
    names = load_file(coded / "model.safetensors").keys()
    shutil.copy(coded / "model.safetensors", coded / "model-00001-of-00001.safetensors")
    edit_tensors(coded, lambda tensors: tensors["model.norm.weight"].add_(1))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    parent = Parent(ParentSpec(path=MODEL))
    assert parent.checkpoint.files == [parent.directory / "model.safetensors"]
    assert parent.digest == Parent(ParentSpec(path=str(coded))).digest
    assert hub.downloads["model-00001-of-00001.safetensors"] == 0


def test_code_of_the_hub_is_not_even_fetched_unless_it_is_allowed(hub):
    parent = Parent(ParentSpec(path=MODEL))
    with pytest.raises(ParentError, match=f"parent.allow_remote_code: {ALLOWED}"):
        parent.tokenizer()
    assert hub.downloads["tokenization_reversed.py"] == 0


def test_code_of_the_hub_that_is_allowed_is_fetched_and_runs(hub):
    tokenizer = Parent(ParentSpec(path=MODEL, allow_remote_code=ALLOWED)).tokenizer()
    assert tokenizer.decode(tokenizer("def f")["input_ids"]) == "f fed"
    assert hub.downloads["tokenization_reversed.py"] == 1


def test_a_model_that_the_hub_does_not_have_is_named(hub):
    with pytest.raises(ParentError, match=r"'pico/other' is no directory here, and the hub did not give it"):
        Parent(ParentSpec(path="pico/other"))


def test_code_that_is_allowed_goes_with_the_child_and_counts_in_the_digest(coded, tmp_path):
    with_code, without = (Parent(ParentSpec(path=str(coded), allow_remote_code=allow)) for allow in (ALLOWED, None))
    out_dir = tmp_path / "child"
    out_dir.mkdir()
    write_description(with_code, Architecture.of_parent(with_code.shape), "float32", out_dir)
    assert (out_dir / "tokenization_reversed.py").read_text() == CODE
    assert with_code.tokenizer_digest != without.tokenizer_digest
