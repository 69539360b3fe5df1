"""The GGUF file, read back: an obvious torch version of llama.cpp's graph computes the child from it."""

import pytest
import torch
from gguf import GGUFReader

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ExportError, NonFiniteError
from puzzle_core.export.gguf_file import KINDS, as_stored, export_gguf
from puzzle_core.export.source import Source
from puzzle_core.model.child import load_child
from tests.conftest import CPU
from tests.conftest import MIXED as PICO_MIXED
from tests.pico import edit_tensors
from tests.puzzle_core.export.conftest import CARRIED, MIXED, ODD_WIDTHS
from tests.puzzle_core.export.deci_graph import DeciGraph


@pytest.fixture
def graph_of(tmp_path):
    """A source exported and read back."""

    def read(source, kind="f32"):
        export_gguf(source, tmp_path / "child.gguf", kind)
        return DeciGraph(tmp_path / "child.gguf")

    return read


def test_the_graph_computes_the_child(stdlib_source, graph_of, logits_of, text_ids):
    logits = graph_of(stdlib_source).logits(text_ids[0])
    torch.testing.assert_close(logits, logits_of(stdlib_source.directory), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CARRIED)
def test_every_option_of_a_parent_is_carried(name, assemble, graph_of, ids_NT):
    directory = assemble(name, PICO_MIXED)
    ids_T = torch.cat([*ids_NT[:3]]).long()
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_T[None]).logits[0]
    torch.testing.assert_close(graph_of(Source(directory)).logits(ids_T), expected, rtol=1e-3, atol=1e-3)


def test_a_damaged_file_gives_other_logits(stdlib_child, graph_of, logits_of, text_ids):
    source = Source(stdlib_child(MIXED))
    graph = graph_of(source)
    graph.tensors["blk.1.attn_q.weight"] = graph.tensors["blk.1.attn_q.weight"].roll(1, 0)
    difference = graph.logits(text_ids[0]) - logits_of(source.directory)
    assert difference.abs().max() > 0.01


def test_what_the_file_says_of_itself(stdlib_child, graph_of):
    graph = graph_of(Source(stdlib_child(MIXED)), "bf16")
    assert graph.values["general.architecture"] == "deci"
    assert graph.values["general.file_type"] == int(KINDS["bf16"][1])
    assert Architecture.parse(graph.values["puzzle.architecture"]) == Architecture.parse(MIXED)
    # zeros + 0 FFN, 1 attention + 2 FFN, 4 attention, 4 linear FFN, 5 both, 6 both, 7 linear attention
    assert graph.of("attention.head_count") == [8, 8, 8, 8, 8, 8, 8]
    assert graph.of("attention.head_count_kv") == [0, 1, 4, 0, 0, 2, 0]
    assert graph.of("feed_forward_length") == [256, 512, 32, 32, 256, 512, 32]
    sizes = ["embedding_length", "vocab_size", "context_length", "rope.dimension_count", "attention.key_length"]
    assert [graph.of(name) for name in sizes] == [128, 1024, 256, 16, 16]
    assert graph.of("rope.freq_base") == 10000
    assert "rope_freqs.weight" not in graph.tensors
    assert "output.weight" not in graph.tensors


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-6), ("bf16", 1e-4), ("q8_0", 5e-3)])
def test_smaller_types_stay_near(kind, most, stdlib_child, graph_of, logits_of, text_ids):
    source = Source(stdlib_child(MIXED))
    graph = graph_of(source, kind)
    logs, expected = (x.log_softmax(-1) for x in (graph.logits(text_ids[0]), logits_of(source.directory)))
    kl = (expected.exp() * (expected - logs)).sum(-1).mean()
    assert 0 < kl < most
    norms = {name for name in graph.kinds if name.endswith("norm.weight")}
    assert {graph.kinds[name] for name in norms} == {"F32"}
    assert {graph.kinds[name] for name in graph.kinds.keys() - norms} == {kind.upper()}


def test_rows_that_q8_0_cannot_hold_are_f16(stdlib_child, graph_of, tmp_path):
    graph = graph_of(Source(stdlib_child(ODD_WIDTHS)), "q8_0")
    coarse = {name for name, kind in graph.kinds.items() if kind == "F16"}
    assert coarse == {"blk.6.ffn_down.weight"}
    record = export_gguf(Source(stdlib_child(ODD_WIDTHS)), tmp_path / "again.gguf", "q8_0")
    assert record.remarks[0] == "1 tensors in f16, whose rows are no multiple of 32"
    assert record.bytes == (tmp_path / "again.gguf").stat().st_size


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3", "normalises queries and keys"),
        ("smollm3", r"layers \[1\] attend without rotary"),
        ("arcee", "family arcee has ffn_names.*its FFN's activation is 'relu2'"),
        ("gemma3_text", "family gemma3_text has attention_norms.*; its layers attend within a sliding window"),
    ],
)
def test_what_deci_lacks_is_refused_before_any_work(name, reason, assemble, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export_gguf(Source(assemble(name, PICO_MIXED)), tmp_path / "child.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_a_weight_too_large_for_the_type_is_refused(copy_of, tmp_path):
    directory = copy_of("llama")
    edit_tensors(directory, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(1e5))
    with pytest.raises(NonFiniteError, match=r"'blk.1.ffn_up.weight' has entries that are not finite in F16"):
        export_gguf(Source(directory), tmp_path / "child.gguf", "f16")


def test_the_type_is_that_of_the_checkpoint(parent_of, checkpoint_of):
    assert [as_stored(Source(checkpoint_of(name))) for name in ("llama", "bfloat16")] == ["f32", "bf16"]


@pytest.mark.parametrize(
    ("template", "keys"),
    [
        ("{{ messages }}", {"chat_template"}),
        ({"default": "{{ a }}", "tool": "{{ b }}"}, {"chat_template", "chat_template.tool"}),
    ],
)
def test_chat_templates_travel_along(template, keys, parent, tmp_path):
    source = Source(parent.directory)
    source.tokenizer.chat_template = template
    export_gguf(source, tmp_path / "child.gguf", "f32")
    fields = GGUFReader(tmp_path / "child.gguf").fields
    assert {f"tokenizer.{key}" for key in keys} <= fields.keys()
    default = template if isinstance(template, str) else template["default"]
    assert fields["tokenizer.chat_template"].contents() == default


def test_the_tokenizer_is_in_the_file(stdlib_child, graph_of, tmp_path):
    source = Source(stdlib_child(MIXED))
    graph_of(source)
    fields = GGUFReader(tmp_path / "child.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == source.tokenizer.convert_ids_to_tokens(range(1024))
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.merges"].contents()) == 767
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
