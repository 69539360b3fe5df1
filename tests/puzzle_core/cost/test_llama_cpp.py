"""Costs in llama.cpp: its formulas on times that are counted, and the engine itself on the sequences that are meant."""

import ctypes
from unittest import mock

import pytest
import torch

from puzzle_core.architecture import Architecture, Variant
from puzzle_core.cost import llama_cpp
from puzzle_core.cost.llama_engine import CALL_TOKENS, LlamaModel
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.lowering import lower
from puzzle_core.export.source import RandomSource, Source
from puzzle_core.model.child import load_child
from puzzle_core.search.record_tables import cost_table
from puzzle_core.sizes import variant_size
from puzzle_core.spec import TargetSpec, VariantsSpec
from puzzle_core.target import load_target
from puzzle_core.work import CostWork, TimingWork, Traffic
from tests.conftest import CPU, MIXED
from tests.puzzle_core.export.conftest import STDLIB

TARGET = TargetSpec(engine="llama.cpp", rounds=3, dtype="float32")
TRAFFIC = Traffic(prompt_tokens=16, generated_tokens=9, batch_size=2)
OUTSIDE = 1000.0
SPACE = VariantsSpec(kv_heads=(1,), ffn_ratios=(0.5,))


def work(shape, target=TARGET):
    variants = {variant for found in SPACE.of_layer(0, shape) for variant in found if not variant.is_empty}
    return CostWork(shape="s", variants=tuple(sorted(variants)), traffic=TRAFFIC, target=target, hardware="abacus")


def counted(shape, architecture):
    """The "time" of a lowered child: the parameters of everything that llama.cpp computes, zeros too."""
    slots = [half.variant for layer in lower(architecture, shape) for half in (layer.attention, layer.ffn) if half]
    return OUTSIDE + sum(variant_size(shape, variant).parameters for variant in slots)


def counted_record(shape, target=TARGET):
    asked = work(shape, target)
    rounds = {name: counted(shape, found) for name, found in llama_cpp.cost_architectures(asked, shape).items()}
    times = {name: {"prefill": [t] * 3, "decode": [2 * t] * 3} for name, t in rounds.items()}
    with mock.patch.object(llama_cpp, "engine_version", return_value="an abacus"):  # the engine may not be here
        return llama_cpp.cost_record(asked, shape, times)


@pytest.mark.parametrize("stack_bytes", [llama_cpp.STACK_BYTES, 1], ids=["in every layer", "in two layers"])
def test_a_variant_takes_its_own_time_and_the_rest_is_outside(parent, monkeypatch, stack_bytes):
    monkeypatch.setattr(llama_cpp, "STACK_BYTES", stack_bytes)
    shape, record = parent.shape, counted_record(parent.shape)
    narrowest = variant_size(shape, llama_cpp.NARROWEST).parameters
    depth = llama_cpp._depth(work(shape), shape)
    for name, timing in record.variants.items():
        variant = Variant.parse(name)
        extra = (1.5 + 0.5 / depth) * narrowest if name == "ffn:linear" else 0  # its own layer's zeros, at the mean
        assert timing.prefill_ms == pytest.approx(variant_size(shape, variant).parameters + extra)
        assert timing.decode_ms == pytest.approx(2 * timing.prefill_ms)
    assert record.outside.prefill_ms == pytest.approx(OUTSIDE)
    assert record.no_ffn.prefill_ms == pytest.approx(narrowest)
    assert record.parent.prefill_ms == counted(shape, Architecture.of_parent(shape))
    assert (record.kv_bytes, record.weight_bytes, record.rounds) == (2, 4, 3)


NO_OPS = ("attn:kv4+ffn:i48", "attn:kv1+ffn:no_op", "attn:no_op+ffn:no_op", "attn:kv4+ffn:no_op", "attn:kv4+ffn:i24")
LINEAR = ("attn:kv1+ffn:i48", "attn:linear+ffn:no_op", "attn:linear+ffn:i24", NO_OPS[2], "attn:kv4+ffn:i48")


@pytest.mark.parametrize("blocks", [NO_OPS, LINEAR], ids=["no-ops", "linear"])
def test_the_table_of_the_search_adds_up_to_what_the_export_computes(parent, blocks):
    table = cost_table(SPACE, parent.shape, {("chat", 2): counted_record(parent.shape)})
    found = sum(
        table.block("prefill_ms", n, block, "chat", 2) for n, block in enumerate(Architecture.parse(blocks).layers)
    )
    assert found + table.outside("prefill_ms", "chat", 2) == pytest.approx(
        counted(parent.shape, Architecture.parse(blocks))
    )


def test_what_drowns_in_noise_is_refused(parent):
    asked = work(parent.shape)
    times = {
        name: {"prefill": [5.0] * 3, "decode": [5.0] * 3} for name in llama_cpp.cost_architectures(asked, parent.shape)
    }
    with pytest.raises(MeasurementError, match=r"is not positive.*too noisy"):
        llama_cpp.cost_record(asked, parent.shape, times)


def test_types_of_the_weights():
    assert llama_cpp.gguf_type(TARGET) == "f32"
    assert llama_cpp.gguf_type(TARGET.model_copy(update={"dtype": "bfloat16"})) == "bf16"
    assert llama_cpp.gguf_type(TARGET.model_copy(update={"gguf_type": "q8_0"})) == "q8_0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: vllm", r"vllm, which is not measured here.*costs: imported"),
        ("engine: llama.cpp\ndevice: cuda", "measured on cpu alone"),
        ("gguf_type: q8_0", "gguf_type is given, but engine is torch"),
        ("engine: llamacpp", "torch"),
    ],
)
def test_what_an_engine_cannot_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "target.yaml").write_text(f"name: t\n{text}\n")
    with pytest.raises(SpecError, match=message):
        load_target(tmp_path / "target.yaml")


def test_imported_costs_may_be_of_vllm(tmp_path):
    (tmp_path / "target.yaml").write_text("name: t\nengine: vllm\ncosts: imported\ntable: costs.csv\n")
    assert load_target(tmp_path / "target.yaml").engine == "vllm"


def test_random_weights_have_the_shapes_and_settings_of_the_child(assemble, parent):
    child, found = Source(assemble("llama", MIXED)), RandomSource(parent.directory, Architecture.parse(MIXED))
    assert {t.name: t.shape for t in found.tensors()} == {t.name: t.shape for t in child.tensors()}
    assert found.shape == child.shape
    assert all(tensor.make().shape == tensor.shape for tensor in found.tensors())


class TestEngine:
    """In llama.cpp itself."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make engines")

    def logits(self, model, index):
        """Of the token at this place of the last call."""
        size = model._api.llama_vocab_n_tokens(model._api.llama_model_get_vocab(model._model))
        pointer = model._api.llama_get_logits_ith(model._context, index)
        return torch.tensor((ctypes.c_float * size).from_address(ctypes.addressof(pointer.contents)))

    def test_every_sequence_has_its_own_cache_of_the_length_that_is_timed(self, assemble, tmp_path):
        directory = assemble("llama", MIXED)
        export_gguf(Source(directory), tmp_path / "child.gguf", "f32")
        child = load_child(directory, torch.float32, CPU).requires_grad_(False)
        model = LlamaModel(tmp_path / "child.gguf", 3, 100, 1)

        def expect(length, sequences):
            wanted = child(input_ids=torch.ones(1, length, dtype=torch.long)).logits[0, -1].log_softmax(-1)
            for index in sequences:
                found = self.logits(model, index).log_softmax(-1)
                torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)  # float16 in cache and flash attention

        assert model.prefill_ms(40) > 0
        expect(40, (39, 79, 119))
        assert len(model.steps_ms(50, 5)) == 5
        expect(55, range(3))
        assert len(model.steps_ms(20, 2)) == 2
        expect(22, range(3))
        model.close()

    def test_prompts_longer_than_a_call_are_cut(self, parent, tmp_path):
        export_gguf(RandomSource(parent.directory), tmp_path / "parent.gguf", "f32")
        model = LlamaModel(tmp_path / "parent.gguf", 20, 120, 1)
        model.prefill_ms(120)
        assert CALL_TOKENS < 20 * 120
        last = [model._api.llama_memory_seq_pos_max(model._memory, sequence) for sequence in range(20)]
        assert last == [119] * 20
        model.close()

    def test_what_it_cannot_load_is_named(self, tmp_path):
        (tmp_path / "no.gguf").write_text("nothing")
        with pytest.raises(MeasurementError, match=r"cannot load .*no\.gguf"):
            LlamaModel(tmp_path / "no.gguf", 1, 16, 1)

    def test_a_deeper_model_takes_longer(self):
        """The example's parent against two of its layers; four times as much work, and noise is far below that."""
        from puzzle_core.model.parent import Parent
        from puzzle_core.spec import ParentSpec

        parent = Parent(ParentSpec(path=str(STDLIB)))
        own, empty = "attn:kv4+ffn:i512", "attn:no_op+ffn:no_op"
        stacks = {"parent": (own,) * 8, "shallow": (own, own) + (empty,) * 6}
        asked = TimingWork(
            shape="s",
            architectures=tuple((name, Architecture.parse(blocks)) for name, blocks in stacks.items()),
            traffic=TRAFFIC.model_copy(update={"prompt_tokens": 100}),
            target=TARGET,
            hardware="h",
        )
        record = llama_cpp.time_architectures(asked, parent)
        assert record.models["parent"].prefill_ms > 2 * record.models["shallow"].prefill_ms
        assert record.models["parent"].decode_ms > 2 * record.models["shallow"].decode_ms
