"""Initial weights of attentions: pooled KV heads and the linear layer of tokens that see only themselves."""

import pytest
import torch

from puzzle_core.architecture import Variant
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.surgery import variant_block
from puzzle_core.variants.attention import linear_attention, mean_pool
from tests.conftest import CPU
from tests.reference.variants import pooled_heads

ATTENTIONS = ["llama", "qwen2", "qwen3", "attention-bias", "wide-heads", "gemma3_text", "olmo2"]


@pytest.fixture
def linear_block(parent_of, initial_state):
    """The linear attention of layer 1 of a pico parent."""
    return lambda name: variant_block(
        parent_of(name), 1, Variant("attn", "linear"), initial_state(name, 1, "attn:linear"), torch.float32, CPU
    )


def test_pooling_groups_of_one_head_is_the_identity(parent):
    own = parent.layer_tensors(0)["self_attn.k_proj.weight"]
    assert mean_pool(own, 4, 4) is own


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_pooled_projections_are_the_means_of_adjacent_heads(name, kv_heads, parent_of, initial_state):
    parent = parent_of(name)
    own, state = parent.layer_tensors(1), initial_state(name, 1, f"attn:kv{kv_heads}")
    assert state.keys() == {name for name in own if name.startswith(FAMILIES[parent.shape.family].attention_prefixes)}
    of_all_keys = ["k_norm"] if name == "olmo2" else []
    for name, tensor in state.items():
        pooled = any(part in name for part in ["k_proj", "v_proj", *of_all_keys])
        expected = pooled_heads(own[name], kv_heads, parent.shape.head_dim) if pooled else own[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


def test_heads_of_one_projection_are_pooled_where_the_keys_and_the_values_are(parent_of, initial_state):
    parent, state = parent_of("phi3"), initial_state("phi3", 1, "attn:kv2")
    queries, keys, values = parent.layer_tensors(1)["self_attn.qkv_proj.weight"].split([32, 16, 16])
    expected = [queries, pooled_heads(keys, 2, 4), pooled_heads(values, 2, 4)]
    torch.testing.assert_close(state["self_attn.qkv_proj.weight"], torch.cat(expected), rtol=1e-6, atol=1e-7)
    assert torch.equal(state["self_attn.o_proj.weight"], parent.layer_tensors(1)["self_attn.o_proj.weight"])


def test_pooling_keeps_the_type():
    assert mean_pool(torch.ones(2, 1, dtype=torch.bfloat16), 1, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*ATTENTIONS, "phi3", "granite", "ministral3"])
def test_linear_attention_is_attention_where_every_token_sees_itself_alone(name, linear_block, activations_of):
    activations = activations_of(name)
    tokens, context = activations.layer_input(1).flatten(0, 1).unsqueeze(1), dict(activations.contexts()[1])
    context["position_embeddings"] = tuple(part[:, :1] for part in context["position_embeddings"])
    context |= {"position_ids": context["position_ids"][:, :1], "attention_mask": None}
    alone = activations.parent.block(1, torch.float32, CPU).attend(tokens, **context)
    torch.testing.assert_close(linear_block(name).attend(tokens), alone)


def test_linear_attention_is_not_attention_of_whole_windows(linear_block, activations):
    assert not torch.allclose(
        linear_block("llama").attend(activations.layer_input(1)), activations.post_attention(1), atol=0.1
    )


def test_linear_keeps_the_norm_and_no_op_keeps_nothing(parent):
    layer = parent.layer_tensors(0)
    linear = linear_attention(layer, parent.shape, 0)
    assert torch.equal(linear["input_layernorm.weight"], layer["input_layernorm.weight"])
    assert Variant("attn", "no_op").row.initial_state(layer, parent.shape, 0) == {}
