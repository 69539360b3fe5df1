"""Initial weights of FFNs: the channels that contribute most, and the linear layer that has no gate."""

import pytest
import torch

from puzzle_core.architecture import Variant
from puzzle_core.model.surgery import variant_block
from puzzle_core.variants.ffn import linear_ffn, pruned_ffn
from tests.conftest import CPU

FFNS = ["llama", "qwen2", "mlp-bias", "arcee"]
CONTRIBUTIONS = torch.arange(48).mul(29).remainder(48).float()  # every value once, in no order
KEPT = [channel for channel in range(48) if CONTRIBUTIONS[channel] >= 48 - 20]


def ffn_output(parent, variant, state, middle):
    return variant_block(parent, 1, variant, state, torch.float32, CPU).feed(middle)


@pytest.mark.parametrize("name", FFNS)
def test_pruning_keeps_the_channels_that_contribute_most_in_their_order_bitwise(name, parent_of):
    own = parent_of(name).layer_tensors(1)
    pruned = pruned_ffn(own, parent_of(name).shape, 20, CONTRIBUTIONS)
    for tensor_name, tensor in pruned.items():
        if "down_proj.weight" in tensor_name:
            assert torch.equal(tensor, own[tensor_name][:, KEPT])
        elif "gate_proj" in tensor_name or "up_proj" in tensor_name:
            assert torch.equal(tensor, own[tensor_name][KEPT])
        else:
            assert torch.equal(tensor, own[tensor_name])


def test_channels_of_one_projection_leave_the_gate_and_the_others(parent_of):
    own = parent_of("phi3").layer_tensors(1)
    pruned = pruned_ffn(own, parent_of("phi3").shape, 20, CONTRIBUTIONS)
    gate, up = own["mlp.gate_up_proj.weight"].chunk(2)
    assert torch.equal(pruned["mlp.gate_up_proj.weight"], torch.cat([gate[KEPT], up[KEPT]]))
    assert torch.equal(pruned["mlp.down_proj.weight"], own["mlp.down_proj.weight"][:, KEPT])


@pytest.mark.parametrize("name", [*FFNS, "phi3", "glm4", "gemma2", "olmo2"])
def test_pruned_ffn_is_the_dense_one_without_the_other_channels(name, activations_of):
    parent, middle = activations_of(name).parent, activations_of(name).post_attention(1)
    narrow, dense = Variant("ffn", "sized", 20), parent.shape.largest_block.ffn
    silenced = pruned_ffn(parent.layer_tensors(1), parent.shape, 48, CONTRIBUTIONS)
    dropped = [channel for channel in range(48) if channel not in KEPT]
    silenced["mlp.down_proj.weight"][:, dropped] = 0
    pruned = pruned_ffn(parent.layer_tensors(1), parent.shape, 20, CONTRIBUTIONS)
    expected = ffn_output(parent, dense, silenced, middle)
    torch.testing.assert_close(ffn_output(parent, narrow, pruned, middle), expected)
    wrong = pruned_ffn(parent.layer_tensors(1), parent.shape, 20, -CONTRIBUTIONS)
    assert not torch.allclose(ffn_output(parent, narrow, wrong, middle), expected, atol=0.1)


def test_full_width_is_the_parents_own_bitwise(parent):
    own = parent.layer_tensors(1)
    state = pruned_ffn(own, parent.shape, 48, CONTRIBUTIONS)
    assert all(torch.equal(tensor, own[name]) for name, tensor in state.items())


def test_pruning_without_contributions_is_our_own_mistake(parent):
    with pytest.raises(AssertionError, match="width 20: nothing says which channels"):
        pruned_ffn(parent.layer_tensors(1), parent.shape, 20, None)


@pytest.mark.parametrize("name", FFNS)
def test_linear_ffn_is_up_then_down(name, activations_of):
    parent, middle = activations_of(name).parent, activations_of(name).post_attention(1)
    linear, dense = Variant("ffn", "linear"), parent.block(1, torch.float32, CPU)
    expected = middle + dense.mlp.down_proj(dense.mlp.up_proj(dense.post_attention_layernorm(middle)))
    state = linear_ffn(parent.layer_tensors(1), parent.shape, 0)
    torch.testing.assert_close(ffn_output(parent, linear, state, middle), expected)
    assert ("mlp.linear_mlp.bias" in state) == (name in ("mlp-bias", "arcee"))


def test_no_op_keeps_nothing(parent):
    assert Variant("ffn", "no_op").row.initial_state(parent.layer_tensors(1), parent.shape, 0) == {}
