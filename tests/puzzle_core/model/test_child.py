"""Children: the all-parent child is the parent bitwise, a mixed one is the same with and without its cache."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ArtifactError
from puzzle_core.model import child
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.model.child import load_child, load_parent, random_child
from puzzle_core.sizes import architecture_parameters, kv_entries
from puzzle_core.work import ChildRecord
from tests.conftest import CPU, MIXED
from tests.pico import PICOS, edit_tensors

NO_ATTENTION = ("attn:no_op+ffn:i48", "attn:linear+ffn:i48") * 2 + ("attn:no_op+ffn:no_op",)
LOAD_ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
directory, ids, logits = sys.argv[1:]
assert "puzzle_core" not in sys.modules
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(input_ids=load_file(ids)["tokens"].long()).logits}, logits)
"""


def greedy(model, ids_BT, steps):
    """Greedy decoding that runs the whole sequence at every step."""
    for _ in range(steps):
        ids_BT = torch.cat([ids_BT, model(input_ids=ids_BT).logits[:, -1:].argmax(-1)], dim=1)
    return ids_BT


@pytest.fixture(params=["llama", "qwen2", "smollm3", "tied", "no attention"])
def model(request, assemble):
    """Children that are hard for a cache."""
    name, blocks = ("llama", NO_ATTENTION) if request.param == "no attention" else (request.param, MIXED)
    return load_child(assemble(name, blocks), torch.float32, CPU).requires_grad_(False)


@pytest.mark.parametrize("name", PICOS)
def test_the_child_that_is_all_parent_has_its_logits_bitwise(name, assemble, parent_of, ids_NT):
    logits = load_child(assemble(name), torch.float32, CPU)(input_ids=ids_NT.long()).logits
    assert torch.equal(logits, load_parent(parent_of(name), torch.float32, CPU)(input_ids=ids_NT.long()).logits)


@pytest.mark.parametrize("name", [name for name, pico in PICOS.items() if pico.family != "llama"])
def test_a_child_of_every_kind_of_variant_runs_by_its_own_code_with_the_cache_and_without(name, assemble, ids_NT):
    directory, ids_BT = assemble(name, MIXED), ids_NT[:2].long()
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_BT).logits
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, expected)
        cache, steps = None, []
        for start, stop in [(0, 11), (11, 12), (12, 16)]:
            output = model(input_ids=ids_BT[:, start:stop], use_cache=True, past_key_values=cache)
            cache, _ = output.past_key_values, steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_mixed_child_has_other_logits(assemble, parent, ids_NT):
    logits = load_child(assemble("llama", MIXED), torch.float32, CPU)(input_ids=ids_NT.long()).logits
    expected = load_parent(parent, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    assert not torch.allclose(logits, expected, atol=0.5)


def test_a_child_loads_where_this_project_is_not(assemble, tokens_dir, checkpoint_of, ids_NT, tmp_path):
    arguments = [assemble("llama"), tokens_dir / "tokens.safetensors", tmp_path / "logits.safetensors"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOAD_ELSEWHERE, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"))(input_ids=ids_NT.long()).logits
    assert torch.equal(load_file(arguments[2])["logits"], expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # before transformers 5.24, and since
def test_logits_are_the_same_with_the_cache_and_without(name, model, ids_NT):
    ids_BT, cache, steps = ids_NT.long(), None, []
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, 16)]:
        output = model(input_ids=ids_BT[:, start:stop], use_cache=True, **{name: cache})
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-5)


def test_generation_is_greedy_decoding_without_a_cache(model, ids_NT):
    prompt = ids_NT[:2, :5].long()
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, greedy(model, prompt, 8))


def test_padding_on_the_left_changes_nothing(model, ids_NT):
    ids_BT = ids_NT[:1, :6].long()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids_BT], dim=1)
    mask, positions = (padded != 0).long(), torch.arange(-3, 6).clamp(min=0).unsqueeze(0)
    mask[:, 3:] = 1
    logits = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-5)


def test_the_cache_holds_what_was_counted(assemble, parent, ids_NT):
    model = load_child(assemble("llama", MIXED), torch.float32, CPU)
    cache = model(input_ids=ids_NT[:1].long(), use_cache=True).past_key_values
    entries = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert entries == kv_entries(parent.shape, Architecture.parse(MIXED), tokens=16)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_the_record_counts_what_lies_on_disk(name, assemble, parent_of, tmp_path, monkeypatch):
    records = []
    monkeypatch.setattr(child, "assemble", lambda *args, write=child.assemble: records.append(write(*args)))
    directory, architecture = assemble(name, MIXED, "bfloat16"), Architecture.parse(MIXED)
    headers = Checkpoint(directory, ArtifactError).headers
    parameters = architecture_parameters(parent_of(name).shape, architecture)
    assert records == [ChildRecord(architecture=architecture, parameters=parameters, parameter_bytes=2 * parameters)]
    assert sum(torch.Size(header.shape).numel() for header in headers.values()) == parameters
    assert {header.dtype for header in headers.values()} == {"BF16"}
    assert ("lm_head.weight" in headers) == (name == "llama")


def test_a_sharded_child_is_the_same_child(assemble, ids_NT, monkeypatch):
    write = child.write_checkpoint
    monkeypatch.setattr(child, "write_checkpoint", lambda *args: write(*args, max_shard_bytes=20_000))
    sharded = assemble("llama", MIXED)
    assert len(Checkpoint(sharded, ArtifactError).files) > 3
    logits = load_child(sharded, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    monkeypatch.undo()
    whole = load_child(assemble("llama", MIXED), torch.float32, CPU)
    assert torch.equal(logits, whole(input_ids=ids_NT.long()).logits)


def test_a_child_carries_everything_that_serving_needs(copy_of, parent, tmp_path):
    directory = copy_of("llama")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    opened = type(parent)(parent.spec.model_copy(update={"path": str(directory)}))
    child.write_description(opened, Architecture.of_parent(parent.shape), "bfloat16", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer("def f") == parent.tokenizer()("def f")
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}), "up_proj.bias"),
    ],
    ids=["missing", "too many"],
)
def test_a_child_with_other_tensors_than_its_config_says_is_refused(change, tensor, assemble):
    directory = assemble("llama")
    edit_tensors(directory, change)
    with pytest.raises(ArtifactError, match=f"1 tensors.*, the first being '.*{tensor}'"):
        load_child(directory, torch.float32, CPU)


def test_a_random_child_has_the_shapes_of_the_assembled_one(assemble, parent):
    random = random_child(parent, Architecture.parse(MIXED), torch.bfloat16, CPU)
    assembled = load_child(assemble("llama", MIXED), torch.bfloat16, CPU)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (random, assembled)]
    assert shapes[0] == shapes[1]
    assert {p.dtype for p in random.parameters()} == {torch.bfloat16}
