"""Attentions within a window: as long as the sequence, shorter, beside a parent's own windows, cached, and costed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.cost.latency import cost_models
from puzzle_core.cost.roofline import roofline
from puzzle_core.distill import bld
from puzzle_core.errors import ExportError, SpecError
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.layered import Batch, layered_child
from puzzle_core.model.parent import Parent
from puzzle_core.model.surgery import variant_block
from puzzle_core.plan import Inputs, Plan
from puzzle_core.scoring import score_block
from puzzle_core.search.from_tables import read_request, search_tables
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, unscored_table
from puzzle_core.sizes import architecture_parameters, kv_entries
from puzzle_core.spec import BldSpec, ParentSpec, VariantsSpec, parse_spec
from puzzle_core.work import BldWork, CostWork, ScoreWork
from tests.conftest import CPU
from tests.puzzle_core.cost.test_roofline import target
from tests.reference import windows

FFN = "ffn:i48"
ATTENTIONS = ("attn:no_op", "attn:kv2:w5", "attn:kv4", "attn:kv4:w3", "attn:kv1")
BLOCKS = tuple(f"{attention}+{FFN}" for attention in ATTENTIONS)
FAMILIES = ["llama", "mistral-window", "gemma2", "gemma3_text", "exaone4"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_as_long_as_the_sequence_is_the_full_attention_bitwise(name, activations_of, initial_state):
    activations, parent = activations_of(name), activations_of(name).parent
    for layer in (1, 2):
        state, outputs = initial_state(name, layer, "attn:kv2"), {}
        for variant in ("attn:kv2", "attn:kv2:w16", "attn:kv2:w4"):
            block = variant_block(parent, layer, Variant.parse(variant), state, torch.float32, CPU)
            outputs[variant] = block.attend(activations.layer_input(layer), **activations.contexts()[layer])
        assert torch.equal(outputs["attn:kv2:w16"], outputs["attn:kv2"])
        difference = (outputs["attn:kv2:w4"] - outputs["attn:kv2"]).abs().amax((0, 2))
        assert difference[:4].max() < 1e-5 < 1e-3 < difference[4:].min()


def test_a_shorter_window_is_that_of_plain_operations(activations, initial_state):
    state, context = initial_state("llama", 1, "attn:kv2"), activations.contexts()[1]
    block = variant_block(activations.parent, 1, Variant.parse("attn:kv2:w5"), state, torch.float32, CPU)
    for entering_TD in activations.layer_input(1)[:2]:
        found = block.attend(entering_TD[None], **context)[0] - entering_TD
        cos, sin = (table[0] for table in context["position_embeddings"])
        expected = windows.attention(state, block.input_layernorm(entering_TD), cos, sin, window=5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_same_with_the_cache_and_without_and_it_holds_the_window(name, assemble, parent_of, ids_NT):
    model, ids_BT = load_child(assemble(name, BLOCKS), torch.float32, CPU).requires_grad_(False), ids_NT[:2].long()
    expected, cache, steps = model(input_ids=ids_BT).logits, None, []
    for start, stop in [(0, 2), (2, 8), (8, 9), (9, 10), (10, 16)]:
        output = model(input_ids=ids_BT[:, start:stop], use_cache=True, past_key_values=cache)
        cache, _ = output.past_key_values, steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
    shape, seen = parent_of(name).shape, [v.attention for v in Architecture.parse(BLOCKS).layers[1:]]
    seen = [shape.in_layer(layer, variant) for layer, variant in enumerate(seen, 1)]
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held == [variant.window - 1 if variant.window else 16 for variant in seen]
    assert kv_entries(shape, Architecture.parse(BLOCKS), 16) == sum(
        2 * (layer.keys[0].numel() // length) * variant.seen(16)
        for layer, length, variant in zip(cache.layers, held, seen, strict=True)
    )


def test_generation_and_the_checkpoints_own_code_have_the_window(assemble, ids_NT):
    directory, prompt = assemble("llama", BLOCKS), ids_NT[:2, :5].long()
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(input_ids=prompt)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_windows_hold_within_documents(name, assemble, ids_NT):
    """Two documents in one row, by segments or by positions that start again, are as each alone."""
    directory, ids_BT = assemble(name, BLOCKS), ids_NT[:1].long()
    model = layered_child(directory, torch.float32, CPU)
    alone = [model.normalised_states([Batch(part)]) for part in (ids_BT[:, :7], ids_BT[:, 7:])]
    expected = torch.cat([next(states) for states in alone], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    for batch in (Batch(ids_BT, positions), Batch(ids_BT, positions, torch.tensor([[1] * 7 + [2] * 9]))):
        torch.testing.assert_close(next(model.normalised_states([batch])), expected, rtol=1e-4, atol=1e-5)


def test_a_window_trains_and_its_score_is_that_of_the_child(activations, initial_state, assemble, ids_NT, tmp_path):
    spec = BldSpec(tokens=96, batch_tokens=48, epochs=10, optimizer={"learning_rate": 0.01})
    variant = Variant.parse("attn:kv4:w3")
    work = BldWork(parent="p", layer=1, variant=variant, tokens="t", contributions=None, seed=0, spec=spec)
    record = bld.train_variant(work, activations, None, tmp_path)
    assert record.curve[-1] < 0.8 * record.curve[0]
    own = f"attn:kv4+{FFN}"
    block = BlockVariant.parse(f"{variant}+{FFN}")
    score = ScoreWork(parent="p", layer=1, block=block, attention="a", ffn=None, tokens="t", dtype="float32")
    found = score_block(score, activations, {str(variant): initial_state("llama", 1, str(variant))})
    logits = [
        load_child(assemble("llama", blocks), torch.float32, CPU)(input_ids=ids_NT.long()).logits.log_softmax(-1)
        for blocks in ((own,) * 5, (own, str(block), own, own, own))
    ]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert found.kl_nats_per_token == pytest.approx(kl.item(), rel=1e-4)


def space(parent, **parts):
    content = {
        "parent": {"path": "p"},
        "data": {"sequence_length": 16},
        "variants": {"kv_heads": [2], "windows": [3, 12], "linear": False},
        "bld": {"tokens": 96, "batch_tokens": 96},
        "scenario": {"prompt_tokens": 20, "generated_tokens": 11, "batch_sizes": [2], "limits": {"memory": "50%"}},
        "target": target().model_dump(mode="json", exclude_none=True),
    }
    inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
    return Plan(parse_spec(content | parts, "test"), Inputs(shape=parent.shape, **inputs))


def test_a_child_with_windows_is_a_parent_whose_windows_get_shorter(assemble, ids_NT):
    directory = assemble("llama", BLOCKS)
    parent, ids_BT = Parent(ParentSpec(path=str(directory))), ids_NT.long()
    child, opened = load_child(directory, torch.float32, CPU), load_parent(parent, torch.float32, CPU)
    assert torch.equal(opened(input_ids=ids_BT).logits, child(input_ids=ids_BT).logits)
    space = VariantsSpec(kv_heads=(1,), windows=(2, 4, 9), linear=False, no_op=False)
    offered = [" ".join(map(str, space.of_layer(layer, parent.shape)[0])) for layer in range(4)]
    assert offered[0] == "attn:no_op"
    assert offered[1] == "attn:kv2:w5 attn:kv2:w4 attn:kv2:w2 attn:kv1:w5 attn:kv1:w4 attn:kv1:w2"
    assert offered[2].split()[:4] == ["attn:kv4", "attn:kv1", "attn:kv4:w9", "attn:kv4:w4"]
    assert offered[3] == "attn:kv4:w3 attn:kv4:w2 attn:kv1:w3 attn:kv1:w2"


def test_windows_are_offered_for_every_number_of_kv_heads_and_below_the_layers_own(parent_of):
    offered = VariantsSpec(kv_heads=(2,), windows=(3, 12), linear=False, no_op=False)
    reduced = ["attn:kv4:w12", "attn:kv4:w3", "attn:kv2:w12", "attn:kv2:w3"]
    attentions, _ = offered.of_layer(0, parent_of("llama").shape)
    assert list(map(str, attentions)) == ["attn:kv4", "attn:kv2", *reduced]
    attentions, _ = offered.of_layer(0, parent_of("gemma2").shape)  # a layer with a window of 6
    assert list(map(str, attentions)) == ["attn:kv4", "attn:kv2", "attn:kv4:w3", "attn:kv2:w3"]
    assert offered.served_by(("transformers",), parent_of("llama").shape) == offered
    assert not offered.served_by(("vllm",), parent_of("llama").shape).windows
    assert "windows" not in VariantsSpec().model_dump(), "a spec without them keeps the keys of its works"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scoring": {"sequence_length": 12}}, "attn:kv4:w12 sees 12 tokens, and scoring reads 12 at a time"),
        ({"variants": {"windows": [16]}}, "attn:kv4:w16 sees 16 tokens, and bld reads 16 at a time.*sequence_length"),
        ({"variants": {"windows": [128]}}, "attn:kv4:w128 is the full attention: the parent's context holds 128"),
        ({"variants": {"ids": ["attn:kv3:w4"]}}, "attn:kv3:w4 does not fit: 3 KV heads"),
    ],
)
def test_windows_that_make_no_difference_are_refused(parts, message, parent):
    with pytest.raises(SpecError, match=message):
        space(parent, **parts)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_costs_stop_at_the_window(name, parent_of):
    """Times against sums over all contexts one by one, and the memory of a child against its own cache."""
    parent = parent_of(name)
    plan, shape = space(parent), parent.shape
    (work,) = plan.costs().values()
    costs = roofline(shape, work.variants, work.traffic, work.target)
    assert {variant.window for variant in work.variants} == {"llama": {0, 3, 12}, "mistral-window": {0, 3, 6}}.get(
        name, {0, 3, 6, 12}
    )
    for variant in (v for v in work.variants if v.kv_heads):
        contexts = [min(tokens, variant.window or tokens) for tokens in range(21, 31)]
        cache_bytes = 2 * sum(contexts) * variant.row.kv_entries(shape, variant.size) * 2
        narrow = Variant.parse(f"attn:kv{variant.size}:w1")
        alone = roofline(shape, [narrow], work.traffic, work.target).variants[str(narrow)]
        one = 2 * len(contexts) * variant.row.kv_entries(shape, variant.size) * 2
        assert costs.variants[str(variant)].decode_ms - alone.decode_ms == pytest.approx((cache_bytes - one) / 1e9)
    own = [costs.variants[str(shape.in_layer(n, shape.parent_block(n).attention))] for n in range(shape.layers)]
    ffns = shape.layers * costs.variants[str(shape.parent_block(0).ffn)].decode_ms
    assert costs.parent.decode_ms == pytest.approx(costs.outside.decode_ms + sum(t.decode_ms for t in own) + ffns)
    table = cost_table(plan.variants, shape, {("chatbot", 2): costs}, {"chatbot": 31})
    builder = ProblemBuilder(plan.spec.request, unscored_table(plan.variants, shape), table)
    for architecture in (Architecture.of_parent(shape), Architecture.parse([f"attn:kv2:w3+{FFN}"] * 5)):
        totals = builder.predict(architecture, {"chatbot": 2})["chatbot"].totals
        weights = 2 * architecture_parameters(shape, architecture)
        assert totals["memory_bytes"] == pytest.approx(weights + 2 * 2 * kv_entries(shape, architecture, 31))


def test_a_window_is_searched_from_tables(tmp_path):
    (tmp_path / "scores.csv").write_text("layer,attention,ffn,score\n0,kv4,i8,0\n0,kv4:w64,i8,1\n0,attn:kv2,i8,2\n")
    (tmp_path / "costs.csv").write_text(
        "subblock,variant,kv_bytes_per_token\nattn,kv4,4\nattn,kv2,2\nattn,kv4:w64,1\nffn,i8,0\noutside,,0\n"
    )
    limits = '{kv_bytes_per_token: 3B, counts: {"attn:kv:w": 1}}'
    (tmp_path / "scenario.yaml").write_text(f"{{name: chat, batch_sizes: [1], limits: {limits}}}")
    request = read_request([tmp_path / "scenario.yaml"])
    record = search_tables(tmp_path / "scores.csv", tmp_path / "costs.csv", request, tmp_path / "out")
    assert [str(block) for block in record.best.architecture.layers] == ["attn:kv4:w64+ffn:i8"]


def test_a_variant_is_measured_where_it_runs_as_it_is_named(parent_of):
    parent = parent_of("gemma2")  # windows of 6 in layers 0, 2 and 3
    variants = tuple(map(Variant.parse, ("attn:kv4", "attn:kv4:w6", "attn:kv4:w3")))
    (work,) = space(parent).costs().values()
    asked = CostWork(**dict(work) | {"variants": variants, "target": {"device": "cpu", "dtype": "float32"}})
    models = cost_models(asked, parent)
    windows = {name: [b.window for b in models[name].model.layers if b.kv_heads] for name in map(str, variants)}
    assert windows == {"attn:kv4": [0, 0], "attn:kv4:w6": [6] * 5, "attn:kv4:w3": [3] * 5}


def test_formats_without_windows_refuse_them_by_name(assemble, tmp_path):
    source = Source(assemble("llama", BLOCKS))
    (tmp_path / "hf").mkdir()
    refusal = "no place for layer 1 attn:kv2:w5, layer 3 attn:kv4:w3"
    with pytest.raises(ExportError, match=refusal):
        export_hf(source, tmp_path / "hf", widths="any")
    with pytest.raises(ExportError, match=refusal):
        export_gguf(source, tmp_path / "child.gguf", "f32")
