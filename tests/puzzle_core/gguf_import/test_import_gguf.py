"""A GGUF file as a parent: weights, config and tokens are those of the checkpoint that the file was made of."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from puzzle_core.errors import ParentError
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.source import Source
from puzzle_core.gguf_import.import_gguf import import_gguf
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from tests.pico import Pico, write_pico

EXPORTED = ["llama", "mistral", "tied", "attention-bias", "mlp-bias", "wide-heads", "rope-llama3", "rope-linear"]
CONVERTED = [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("mistral", "mistral"), ("tied", "llama")]


def opened(directory):
    return Parent(ParentSpec(path=str(directory)))


def assert_same_parent(imported, original):
    """Weights bitwise, and everything that decides what the model computes."""
    names = original.checkpoint.headers.keys()
    assert imported.checkpoint.headers.keys() == names
    for name in names:
        assert torch.equal(imported.checkpoint.tensor(name), original.checkpoint.tensor(name)), name
    assert imported.shape.model_copy(update={"family": original.shape.family}) == original.shape
    for key in ("rope_parameters", "rms_norm_eps", "bos_token_id", "eos_token_id"):
        assert getattr(imported.config, key) == getattr(original.config, key), key


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_file_comes_back_bitwise(name, parent_of, checkpoint_of, tmp_path):
    source = Source(checkpoint_of(name))
    source.tokenizer.chat_template = {"default": "{{ a }}é", "tool": "{{ b }}"}
    export_gguf(source, tmp_path / "model.gguf", "f32")
    import_gguf(tmp_path / "model.gguf", tmp_path / "parent")
    imported = opened(tmp_path / "parent")
    assert_same_parent(imported, parent_of(name))
    ours, theirs = imported.tokenizer(), parent_of(name).tokenizer()
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("def f(x):\n    return 12")["input_ids"] == theirs("def f(x):\n    return 12")["input_ids"]
    assert ours.chat_template == {"default": "{{ a }}é", "tool": "{{ b }}"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "parent"}


@pytest.mark.parametrize(("name", "architecture"), CONVERTED)
def test_a_converted_file_of_every_architecture(name, architecture, parent_of, write_gguf, tmp_path):
    import_gguf(write_gguf(name, architecture), tmp_path / "parent")
    assert_same_parent(opened(tmp_path / "parent"), parent_of(name))


def test_gemma_3_comes_with_its_windows_norms_and_two_rotations(write_gguf, ids_NT, tmp_path):
    """Norms are stored with one added, which float32 does not undo to the last bit."""
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    config = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "rope_parameters": rope}
    original = write_pico(tmp_path / "original", Pico("gemma3_text", config | {"num_hidden_layers": 6}))
    file = write_gguf(original, "gemma3", changes={"gemma3.attention.sliding_window": 6})
    import_gguf(file, tmp_path / "parent")
    logits = [
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=ids_NT.long()).logits
        for directory in (original, tmp_path / "parent")
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    imported = opened(tmp_path / "parent")
    assert imported.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert imported.shape == opened(original).shape


def test_rows_of_queries_are_in_halves_of_each_head(write_gguf, tmp_path):
    weights = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)
    import_gguf(write_gguf("llama", "llama", tensors={"blk.0.attn_q.weight": weights}), tmp_path / "parent")
    rows = opened(tmp_path / "parent").checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")[:, 0] / 32
    assert rows[:4].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0])
def test_types_are_kept_or_dequantised(kind, write_gguf, parent_of, tmp_path):
    import_gguf(write_gguf("qwen3", "qwen3", kind), tmp_path / "parent")
    imported, original = opened(tmp_path / "parent").checkpoint, parent_of("qwen3").checkpoint
    name = "model.layers.2.mlp.gate_proj.weight"
    written = original.tensor(name).numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(written, kind), kind)
    assert torch.equal(imported.tensor(name).float(), torch.from_numpy(expected))
    assert imported.headers[name].dtype == {Kind.F16: "F16", Kind.BF16: "BF16"}.get(kind, "F32")
    norm = "model.layers.2.input_layernorm.weight"
    assert torch.equal(imported.tensor(norm), original.tensor(norm))


WRONG = {
    "another architecture": ("phi3", {}, {}, "architecture 'phi3', which cannot be imported; known: deci, gemma3, ll"),
    "missing key": ("llama", {"llama.block_count": None}, {}, "lacks the metadata llama.block_count"),
    "wrong kind": ("llama", {"llama.block_count": "five"}, {}, "block_count is 'five', where a whole number"),
    "unknown key": ("llama", {"llama.expert_count": 8}, {}, "no place for here: llama.expert_count = 8"),
    "layers that differ": ("llama", {"llama.feed_forward_length": [48, 48, 32, 48, 48]}, {}, "differs between layers"),
    "wrong vocabulary": ("llama", {"llama.vocab_size": 9}, {}, "vocab_size is 9, the embedding has 97 rows"),
    "partial rotary": ("llama", {"llama.rope.dimension_count": 2}, {}, "is 2, where the head width 4 is expected"),
    "yarn": ("llama", {"llama.rope.scaling.type": "yarn"}, {}, "is 'yarn'; none and linear"),
    "heads": (
        "llama",
        {"llama.attention.head_count": 7, "llama.attention.key_length": None},
        {},
        "no multiple of its 7",
    ),
    "more layers": ("llama", {"llama.block_count": 6}, {}, "lacks 9 tensors of its architecture.*blk.5"),
    "another tensor": (
        "llama",
        {},
        {"blk.0.extra.weight": np.zeros((2, 2), np.float32)},
        "holds 1 tensors of no place",
    ),
    "wrong shape": ("llama", {}, {"output_norm.weight": np.zeros(31, np.float32)}, r"shape \(31,\).*ask for \(32,\)"),
    "factors": ("llama", {}, {"rope_freqs.weight": np.array([3, 2], np.float32)}, "no rotary scaling that is known"),
    "no tokenizer": ("llama", {"tokenizer.ggml.model": None}, {}, "lacks the metadata tokenizer.ggml.model"),
    "another tokenizer": ("llama", {"tokenizer.ggml.model": "bert"}, {}, "kind 'bert'; gpt2 and llama"),
    "another split": ("llama", {"tokenizer.ggml.pre": "viking"}, {}, "pre is 'viking', a split that is not known"),
    "a foreign merge": ("llama", {"tokenizer.ggml.merges": ["a c"]}, {}, "merge 'a c', whose token 'c' it lacks"),
    "a token twice": ("llama", {"tokenizer.ggml.tokens": ["<s>", "a", "b", "a"]}, {}, "token 'a' twice, as 1 and 3"),
    "a part": ("llama", {"split.count": 3}, {}, "one of 3 parts: join them first"),
    "an adapter": ("llama", {"general.type": "adapter"}, {}, "of type 'adapter'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_contradictions_are_refused_by_name(what, write_gguf, tmp_path):
    architecture, changes, tensors, message = WRONG[what]
    file = write_gguf("llama", architecture, changes=changes, tensors=tensors)
    with pytest.raises(ParentError, match=message):
        import_gguf(file, tmp_path / "parent")
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_file_and_a_full_directory_are_refused(write_gguf, tmp_path):
    file = write_gguf("llama", "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ParentError, match="exists and is not empty"):
        import_gguf(file, tmp_path / "full")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ParentError, match="truncated or no GGUF file"):
        import_gguf(file, tmp_path / "parent")
