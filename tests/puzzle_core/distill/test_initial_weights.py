"""Ways to start a variant: KV heads that are kept and channels of several cuts, and the choice by BLD's own loss."""

import pytest
import torch

from puzzle_core.architecture import Variant
from puzzle_core.distill import bld
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.surgery import load_weights, variant_block
from puzzle_core.spec import BldSpec
from puzzle_core.variants import ffn
from puzzle_core.work import BldWork
from tests.conftest import CPU

LAYER = 1


@pytest.fixture
def inner_of(activations_of):
    """What enters the last projection of a pico parent's own subblock, by the parent's name and the projection's."""

    def run(name, projection):
        activations, entered = activations_of(name), []
        block = activations.parent.load_block(LAYER, torch.float32, CPU)
        module = block.get_submodule(projection)
        module.register_forward_pre_hook(lambda _, args: entered.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            block(activations.layer_input(LAYER), **activations.contexts()[LAYER])
        return entered[0], module.weight

    return run


@pytest.fixture
def states_of(parent_of):
    def make(name, variant, inner_NI):
        parent, variant = parent_of(name), Variant.parse(variant)
        return variant.row.other_states(parent.layer_tensors(LAYER), parent.shape, variant.size, inner_NI)

    return make


@pytest.mark.parametrize("name", ["llama", "qwen2", "olmo2"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_kept_heads_are_the_first_or_those_whose_queries_add_most(name, kv_heads, inner_of, states_of, parent_of):
    parent, (inner_NI, out_DI) = parent_of(name), inner_of(name, "self_attn.o_proj")
    own, states = parent.layer_tensors(LAYER), states_of(name, f"attn:kv{kv_heads}", inner_NI)
    added = torch.zeros(4)
    for head in range(8):
        columns = slice(4 * head, 4 * head + 4)
        added[head // 2] += (inner_NI[:, columns] @ out_DI[:, columns].T).norm(dim=1).mean()
    group = 4 // kv_heads
    kept = {"first": [n * group for n in range(kv_heads)]}
    kept["largest"] = [n * group + int(added[n * group : (n + 1) * group].argmax()) for n in range(kv_heads)]
    assert states.keys() == kept.keys()
    of_all_keys = ["k_norm"] if name == "olmo2" else []
    for way, state in states.items():
        assert state.keys() == {key for key in own if key.startswith(FAMILIES[parent.shape.family].attention_prefixes)}
        for key, tensor in state.items():
            rows = [own[key][4 * head : 4 * head + 4] for head in kept[way]]
            by_head = any(part in key for part in ["k_proj", "v_proj", *of_all_keys])
            assert torch.equal(tensor, torch.cat(rows) if by_head else own[key])


def test_heads_of_a_joint_projection_are_kept_where_keys_and_values_are(inner_of, states_of, parent_of):
    inner_NI, _ = inner_of("phi3", "self_attn.o_proj")
    state = states_of("phi3", "attn:kv2", inner_NI)["first"]["self_attn.qkv_proj.weight"]
    queries, keys, values = parent_of("phi3").layer_tensors(LAYER)["self_attn.qkv_proj.weight"].split([32, 16, 16])
    assert torch.equal(state, torch.cat([queries, keys[:4], keys[8:12], values[:4], values[8:12]]))


def test_cut_by_cut_the_channel_goes_whose_loss_adds_least(inner_of, states_of, parent_of, initial_state, monkeypatch):
    monkeypatch.setattr(ffn, "CUTS", 36)  # one channel in each
    inner_NI, down_DI = inner_of("llama", "mlp.down_proj")
    kept = list(range(48))
    while len(kept) > 12:
        without = {}
        for channel in kept:
            gone = [c for c in range(48) if c not in kept or c == channel]
            without[channel] = (inner_NI[:, gone] @ down_DI[:, gone].T).square().sum().item()
        kept.remove(min(without, key=without.__getitem__))
    own, state = parent_of("llama").layer_tensors(LAYER), states_of("llama", "ffn:i12", inner_NI)["iterative"]
    assert torch.equal(state["mlp.up_proj.weight"], own["mlp.up_proj.weight"][kept])
    assert torch.equal(state["mlp.down_proj.weight"], own["mlp.down_proj.weight"][:, kept])
    at_once = initial_state("llama", LAYER, "ffn:i12")["mlp.up_proj.weight"]
    assert not torch.equal(state["mlp.up_proj.weight"], at_once)


@pytest.mark.parametrize(("variant", "ways"), [("attn:kv1", {"first", "largest"}), ("ffn:i12", {"iterative"})])
@pytest.mark.parametrize("micro_batch", [None, 16])
def test_bld_starts_from_the_way_of_the_least_loss_and_records_all(
    variant, ways, micro_batch, activations, contributions_of, tmp_path
):
    def distil(way):
        spec = BldSpec(batch_tokens=48, micro_batch_tokens=micro_batch, initial_weights=way)
        variant_ = Variant.parse(variant)
        work = BldWork(parent="p", layer=LAYER, variant=variant_, tokens="t", contributions="c", seed=0, spec=spec)
        return bld.train_variant(work, activations, contributions_of("llama"), tmp_path)

    plain, best = distil("default"), distil("best")
    assert plain.compared == {}
    assert best.compared.keys() == {"default", *ways}
    assert best.compared["default"] == pytest.approx(plain.initial_loss, rel=1e-6)
    assert best.initial_loss == pytest.approx(min(best.compared.values()), rel=1e-6)
    assert "initial_weights" not in BldSpec().model_dump(), "a spec without it keeps its keys"


def test_ways_are_compared_in_a_window_and_alike_where_no_head_goes(activations, tmp_path):
    spec = BldSpec(batch_tokens=48, initial_weights="best")
    variant = Variant.parse("attn:kv4:w3")
    work = BldWork(parent="p", layer=LAYER, variant=variant, tokens="t", contributions=None, seed=0, spec=spec)
    record = bld.train_variant(work, activations, None, tmp_path)
    assert len(set(record.compared.values())) == 1
    block = variant_block(activations.parent, LAYER, variant, load_weights(tmp_path), torch.float32, CPU)
    assert block.window == 3
