"""Opening a parent: bitwise transformers' own model, nothing read early, and what cannot run is refused by name."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core.errors import NonFiniteError, ParentError
from puzzle_core.model.checkpoint import INDEX, Checkpoint
from puzzle_core.model.child import load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from tests.conftest import CPU
from tests.pico import PICOS, SIZES, edit_config, edit_tensors


def transformers_logits(directory, ids_NT, dtype=torch.float32):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)(input_ids=ids_NT.long()).logits


@pytest.mark.parametrize("name", PICOS)
def test_layer_by_layer_the_parent_has_the_logits_of_transformers_bitwise(
    name, activations_of, parent_of, reference_logits
):
    outside, final = (
        parent_of(name).outside(torch.float32, CPU),
        activations_of(name).layer_input(SIZES["num_hidden_layers"]),
    )
    assert torch.equal(outside.head(outside.model.normalise(final)), reference_logits(name))


def test_layers_in_another_order_give_other_logits(parent, checkpoint_of, ids_NT):
    model = load_parent(parent, torch.float32, CPU)
    model.model.layers[1], model.model.layers[2] = model.model.layers[2], model.model.layers[1]
    logits = model(input_ids=ids_NT.long()).logits
    assert not torch.allclose(logits, transformers_logits(checkpoint_of("llama"), ids_NT), atol=0.1)


def test_in_bfloat16_rotary_frequencies_stay_float32_as_in_transformers(parent, checkpoint_of):
    ids_BT = torch.arange(SIZES["max_position_embeddings"]).remainder(SIZES["vocab_size"]).unsqueeze(0)
    expected = transformers_logits(checkpoint_of("llama"), ids_BT, torch.bfloat16)
    assert torch.equal(load_parent(parent, torch.bfloat16, CPU)(input_ids=ids_BT).logits, expected)
    assert parent.outside(torch.bfloat16, CPU).model.rotary_emb.inv_freq.dtype == torch.float32


def test_opening_reads_no_tensor(checkpoint_of, monkeypatch):
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    Parent(ParentSpec(path=str(checkpoint_of("tied"))))


def test_blocks_are_kept_up_to_the_bytes_allowed(checkpoint_of):
    spec = ParentSpec(path=str(checkpoint_of("llama")))
    roomy, tight = Parent(spec), Parent(spec, cached_bytes=0)
    assert roomy.block(0, torch.float32, CPU) is roomy.block(0, torch.float32, CPU)
    first = tight.block(0, torch.float32, CPU)
    tight.block(1, torch.float32, CPU)
    assert tight.block(0, torch.float32, CPU) is not first


def test_digest_follows_the_weights_and_not_the_place(checkpoint_of, copy_of):
    original, copy = Parent(ParentSpec(path=str(checkpoint_of("llama")))), copy_of("llama")
    assert Parent(ParentSpec(path=str(copy))).digest == original.digest
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert Parent(ParentSpec(path=str(copy))).digest != original.digest


def test_rotary_buffers_of_old_checkpoints_are_left_out(copy_of):
    directory = copy_of("llama")
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    parent = Parent(ParentSpec(path=str(directory)))
    assert not [name for name in parent.layer_tensors(0) if "rotary" in name]


def forget_a_shard(directory):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.bias"] = index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))


def drop_field(directory, name):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))


def to_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate(directory):
    file = sorted(directory.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])


def store_as(directory, dtype):
    edit_tensors(
        directory, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if t.dim() == 2})
    )


REFUSED = {
    "no config": ("llama", lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config not JSON": ("llama", lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "config no object": ("llama", lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "size of a wrong kind": (
        "llama",
        lambda d: edit_config(d, hidden_size="wide"),
        "not valid: 'hidden_size' is 'wide'",
    ),
    "no KV heads": ("llama", lambda d: edit_config(d, num_key_value_heads=0), "not valid: 'num_key_value_heads' is 0,"),
    "negative size": (
        "llama",
        lambda d: edit_config(d, vocab_size=-1),
        "is not valid: 'vocab_size' is -1, where a whole",
    ),
    "size missing": (
        "qwen2",
        lambda d: drop_field(d, "num_attention_heads"),
        "'num_attention_heads' is missing, where",
    ),
    "field of a wrong kind": ("llama", lambda d: edit_config(d, attention_bias="yes"), "is not valid.*attention_bias"),
    "activation": ("llama", lambda d: edit_config(d, hidden_act="relux"), "is not valid: no model can .*'relux'"),
    "too few entries": ("smollm3", lambda d: edit_config(d, no_rope_layers=[1]), "is not valid: no model can .*range"),
    "family of a wrong kind": ("llama", lambda d: edit_config(d, model_type=["llama"]), "not supported; supported"),
    "family": ("llama", lambda d: edit_config(d, model_type="gpt2"), "family 'gpt2'.*supported: arcee, ernie4_5"),
    "quantised": ("llama", lambda d: edit_config(d, quantization_config={"quant_method": "fp8"}), "quantised"),
    "rope": (
        "llama",
        lambda d: edit_config(d, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope type 'dynamic'",
    ),
    "heads": ("llama", lambda d: edit_config(d, num_key_value_heads=3), "3 KV heads do not divide 8"),
    "tensor missing": ("llama", lambda d: edit_config(d, num_hidden_layers=6), "9 tensors that it lacks.*layers.5"),
    "tensor too many": ("llama", lambda d: edit_config(d, num_hidden_layers=4), "9 tensors that .* no place for"),
    "tensor shape": ("llama", lambda d: edit_config(d, intermediate_size=49), r"other shapes.*\(32, 49\).*\(32, 48\)"),
    "shard missing": ("sharded", lambda d: min(d.glob("model-*")).unlink(), "lacks 1 of its .* shards.*model-00001"),
    "shard truncated": ("sharded", truncate, "model-00002.* is truncated"),
    "index wrong": ("sharded", forget_a_shard, "names 1 tensors that its shards do not hold.*model.norm.bias"),
    "index not an index": ("sharded", lambda d: (d / INDEX).write_text("[]"), "is not a safetensors index"),
    "stale layer types": (
        "llama",
        lambda d: edit_config(d, layer_types=["full_attention"] * 9),
        r"is not valid.*must be equal to the number of `layer_types` \(9\)",
    ),
    "number as a text": ("llama", lambda d: edit_config(d, rms_norm_eps="1e-5"), "'rms_norm_eps' expected float"),
    "8-bit floats": ("llama", lambda d: store_as(d, torch.float8_e4m3fn), "quantised weights: .* is of type F8_E4M3"),
    "8-bit numbers": ("llama", lambda d: store_as(d, torch.int8), "quantised weights: .* is of type I8"),
    "pickle": ("llama", to_pickle, "pytorch_model.bin is a pickle, which is never read"),
    "tied to another head": (
        "tied",
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "'lm_head.weight' differs",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_and_says_why(name, damage, message, copy_of):
    directory = copy_of(name)
    damage(directory)
    with pytest.raises(ParentError, match=message):
        Parent(ParentSpec(path=str(directory)))


def test_refuses_a_path_that_is_nothing():
    with pytest.raises(ParentError, match="neither a directory here nor a hub id"):
        Parent(ParentSpec(path="./nowhere"))


def test_a_weight_that_is_not_finite_is_named(copy_of):
    directory = copy_of("llama")
    edit_tensors(directory, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][0, :2].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"'model.layers.3.mlp.up_proj.weight' has 2 NaN or infinite"):
        Parent(ParentSpec(path=str(directory))).check_finite()


def test_code_in_a_tokenizer_needs_permission_by_name(copy_of):
    directory = copy_of("llama")
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    file.write_text(json.dumps(settings))
    for allowed in (None, "tokenization_y.Y"):
        with pytest.raises(ParentError, match=r"parent.allow_remote_code: tokenization_x.X"):
            Parent(ParentSpec(path=str(directory), allow_remote_code=allowed)).tokenizer()


DAMAGED_TOKENIZERS = {
    "missing": (
        lambda d: (d / "tokenizer.json").unlink(),
        r"files there are: tokenizer_config\.json; fetch them again",
    ),
    "truncated": (lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text()[:200]), "char 200"),
    "of another kind": (lambda d: (d / "tokenizer.json").write_text("{}"), "KeyError"),
    "settings no JSON": (lambda d: (d / "tokenizer_config.json").write_text("{"), "JSONDecodeError"),
    "settings no object": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "AttributeError"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_TOKENIZERS.values(), ids=DAMAGED_TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_with_what_is_there(damage, message, copy_of):
    directory = copy_of("llama")
    damage(directory)
    parent = Parent(ParentSpec(path=str(directory)))
    with pytest.raises(ParentError, match=f"cannot load the tokenizer of {directory} .*{message}"):
        parent.tokenizer()


def test_a_tokenizer_needs_no_settings(copy_of):
    directory = copy_of("llama")
    (directory / "tokenizer_config.json").unlink()
    assert Parent(ParentSpec(path=str(directory))).tokenizer()("def")["input_ids"]


def test_tokenizer_without_code_loads(parent):
    tokenizer = parent.tokenizer()
    assert tokenizer.decode(tokenizer("def f(x): return x")["input_ids"]) == "def f(x): return x"


def test_the_type_of_most_weights_is_the_parents(parent_of, copy_of):
    assert {name: parent_of(name).dtype for name in ("llama", "tied", "bfloat16")} == {
        "llama": "float32",
        "tied": "float32",
        "bfloat16": "bfloat16",
    }
    mixed = copy_of("bfloat16")
    name = "model.norm.weight"
    edit_tensors(mixed, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert Parent(ParentSpec(path=str(mixed))).dtype == "bfloat16"
    edit_tensors(mixed, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    assert Parent(ParentSpec(path=str(mixed))).dtype == "float32"
