"""The DeciLM directory: transformers runs it as we run the child, engines find what they read, the rest is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ArtifactError, ExportError, NonFiniteError, ParentError
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.formats.block_configs import from_block_configs
from puzzle_core.model.child import load_child
from tests.conftest import CPU
from tests.conftest import MIXED as PICO_MIXED
from tests.pico import edit_config, edit_tensors
from tests.puzzle_core.export.conftest import CARRIED, CHILDREN, MIXED, ODD_WIDTHS, OWN


def exported(source, out_dir, **options):
    """The exported directory as transformers loads it, and what was written."""
    record = export_hf(source, out_dir, **options)
    model = AutoModelForCausalLM.from_pretrained(out_dir, trust_remote_code=True, dtype=torch.float32)
    return model.eval().requires_grad_(False), record


def test_logits_are_those_of_the_child_bitwise(stdlib_source, logits_of, text_ids, tmp_path):
    model, record = exported(stdlib_source, tmp_path)
    assert torch.equal(model(input_ids=text_ids).logits[0], logits_of(stdlib_source.directory))
    assert record.parameters == model.num_parameters()
    assert record.architecture == stdlib_source.architecture


def test_a_damaged_export_has_other_logits(stdlib_child, logits_of, text_ids, tmp_path):
    source = Source(stdlib_child(MIXED))
    export_hf(source, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["model.layers.5.self_attn.linear_attn.weight"].mul_(1.001))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32)
    assert not torch.equal(model(input_ids=text_ids).logits[0], logits_of(source.directory))


@pytest.mark.parametrize("name", ["mixed", "no attention, first", "nothing, first", "linear attention, first"])
def test_the_cache_gives_the_same(name, stdlib_child, text_ids, tmp_path):
    source = Source(stdlib_child(CHILDREN[name]))
    model, _ = exported(source, tmp_path)
    cache, steps = None, []
    for start, stop in [(0, 30), (30, 31), (31, 48)]:
        output = model(input_ids=text_ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache, _ = output.past_key_values, steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(input_ids=text_ids).logits, rtol=1e-4, atol=1e-4)
    filled = [layer for layer in cache.layers if layer.get_seq_length()]
    assert len(filled) == sum(block.attention.kind == "sized" for block in source.architecture.layers)
    assert cache.get_seq_length() == 48


@pytest.mark.parametrize("name", ["mixed", "no attention, first"])
def test_generation_is_that_of_the_child(name, stdlib_child, text_ids, tmp_path):
    source = Source(stdlib_child(CHILDREN[name]))
    model, _ = exported(source, tmp_path)
    wanted = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = load_child(source.directory, torch.float32, CPU).generate(text_ids, **wanted)
    assert torch.equal(model.generate(text_ids, **wanted), expected)


@pytest.mark.parametrize("name", CARRIED)
def test_every_option_of_a_parent_is_carried(name, assemble, ids_NT, tmp_path):
    directory = assemble(name, PICO_MIXED)
    model, _ = exported(Source(directory), tmp_path, widths="any")
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    error = 1e-4 if name == "phi4" else 0  # a joint projection is one product in the child, and several here
    torch.testing.assert_close(model(input_ids=ids_NT.long()).logits, expected, rtol=0, atol=error)


@pytest.mark.parametrize("name", ["llama", "mlp-bias"])
def test_zero_channels_change_nothing(name, assemble, ids_NT, tmp_path):
    directory = assemble(name, PICO_MIXED)
    model, record = exported(Source(directory), tmp_path, widths="pad")
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    torch.testing.assert_close(model(input_ids=ids_NT.long()).logits, expected, rtol=1e-5, atol=1e-5)
    assert str(record.architecture.layers[0].ffn) == "ffn:i256"
    assert record.remarks[0] == "layer 0: FFN padded with zero channels from 24 to 256"
    assert model.model.layers[0].mlp.up_proj.weight.shape == (256, 32)


def test_widths_off_the_grid_are_refused_before_any_work(stdlib_child, tmp_path):
    source = Source(stdlib_child(ODD_WIDTHS))
    with pytest.raises(ExportError, match=r"multiples of 256 \(layer 6 ffn:i100, layer 7 ffn:i384\).*--widths pad"):
        export_hf(source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_widths_as_they_are_have_no_ffn_mult(stdlib_child, tmp_path):
    export_hf(Source(stdlib_child(ODD_WIDTHS)), tmp_path, widths="any")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["block_configs"][7]["ffn"] == {"intermediate_size": 384, "no_op": False, "replace_with_linear": False}
    assert config["block_configs"][0]["ffn"]["ffn_mult"] == 6.0
    blocks = from_block_configs(config["block_configs"], config["hidden_size"], config["num_attention_heads"])
    assert blocks == Architecture.parse(ODD_WIDTHS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3", "normalises queries and keys"),
        ("smollm3", r"layers \[1\] attend without rotary"),
        ("phi3", "its rotary positions turn a part of every head"),
        ("gemma3_text", "family gemma3_text has attention_norms.*; its layers attend within a sliding window"),
    ],
)
def test_what_a_llama_block_lacks_is_refused(name, reason, assemble, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export_hf(Source(assemble(name, PICO_MIXED)), tmp_path, widths="any")
    assert not list(tmp_path.iterdir())


def test_a_layer_without_positions_may_lose_its_attention(assemble, ids_NT, tmp_path):
    blocks = tuple(f"attn:{'no_op' if layer in (1, 4) else 'kv4'}+ffn:i48" for layer in range(5))
    directory = assemble("smollm3", blocks)
    model, _ = exported(Source(directory), tmp_path, widths="any")
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    assert torch.equal(model(input_ids=ids_NT.long()).logits, expected)


def test_engines_find_what_they_read(stdlib_child, tmp_path):
    export_hf(Source(stdlib_child(MIXED)), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    first, second, *_, linear = [config.block_configs[layer] for layer in (0, 1, 5)]
    assert (first.attention.no_op, first.ffn.no_op, second.ffn.no_op) == (True, False, True)
    assert type(first.ffn.ffn_mult) is float
    assert second.attention.n_heads_in_group == 8
    assert linear.attention.replace_with_linear
    assert not hasattr(first.ffn, "intermediate_size")
    assert not hasattr(config, "qkv_bias")
    content = json.loads((tmp_path / "config.json").read_text())
    keys = {"no_op", "replace_with_linear"}
    for entry in content["block_configs"]:
        assert entry["attention"].keys() == keys | {"n_heads_in_group"}
        assert entry["ffn"].keys() == keys | {"ffn_mult"}
    assert (content["rope_theta"], content["rope_scaling"]) == (10000.0, None)
    assert content["num_key_value_heads"] is content["intermediate_size"] is None


def test_no_tensor_is_there_for_what_is_gone(stdlib_child, tmp_path):
    export_hf(Source(stdlib_child(MIXED)), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {n for n in names if n.startswith("model.layers.3.")} == set()
    assert {n for n in names if n.startswith("model.layers.7.")} == {
        "model.layers.7.input_layernorm.weight",
        "model.layers.7.self_attn.linear_attn.weight",
    }


def test_what_is_saved_again_is_the_same_model(stdlib_child, logits_of, text_ids, tmp_path):
    source = Source(stdlib_child(MIXED))
    model, _ = exported(source, tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(input_ids=text_ids).logits[0], logits_of(source.directory))


def test_the_tokenizer_and_the_dtype_travel_along(stdlib_child, tmp_path):
    source = Source(stdlib_child((OWN,) * 8))
    record = export_hf(source, tmp_path, dtype="bfloat16")
    assert AutoTokenizer.from_pretrained(tmp_path)("def f(x):").input_ids == source.tokenizer("def f(x):").input_ids
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert (record.dtype, record.bytes) == ("bfloat16", 2 * record.parameters)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "generation_config.json").is_file()


def test_it_loads_where_this_project_is_not(stdlib_child, tmp_path):
    record = export_hf(Source(stdlib_child(MIXED)), tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained('.', "
        "trust_remote_code=True); assert 'puzzle_core' not in sys.modules; print(m.num_parameters())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == record.parameters


def test_a_weight_too_large_for_the_type_is_refused(copy_of, tmp_path):
    directory = copy_of("llama")
    edit_tensors(directory, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(1e5))
    (tmp_path / "out").mkdir()
    with pytest.raises(NonFiniteError, match=r"1e\+05 is not finite in torch.float16"):
        export_hf(Source(directory), tmp_path / "out", widths="any", dtype="float16")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")),
            ArtifactError,
            "1 tensors that it lacks",
        ),
        (lambda d: (d / "config.json").unlink(), ArtifactError, "holds no checkpoint of a child"),
        (lambda d: edit_config(d, model_type="gpt2"), ParentError, "is of family 'gpt2'"),
    ],
    ids=["tensor", "no config", "family"],
)
def test_a_damaged_child_is_refused_by_name(damage, kind, message, assemble):
    directory = assemble("llama", PICO_MIXED)
    damage(directory)
    with pytest.raises(kind, match=message):
        Source(directory)
