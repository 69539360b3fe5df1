"""A DeciLM model for transformers 5: Llama's own parts, of which each layer has its own sizes, a linear layer, or none.

A subblock that a layer lacks has no norm either; a linear one keeps its norm. The cache numbers real attentions, not
layers: transformers reads the past length from cache entry 0, which must exist even if layer 0 lost its attention.
"""

import copy

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_decilm import DeciLMConfig


class DeciLMAttention(LlamaAttention):
    """Llama's attention with the KV heads of one layer."""

    def __init__(self, config, kv_heads, cache_index):
        sizes = copy.copy(config)
        sizes.num_key_value_heads = kv_heads
        sizes.attention_bias = _value_has_bias(config)
        super().__init__(sizes, cache_index)
        self.config = config
        if config.attention_bias != sizes.attention_bias:
            self.o_proj = nn.Linear(self.o_proj.in_features, config.hidden_size, bias=config.attention_bias)


class DeciLMLinearAttention(nn.Module):
    """One linear layer in the place of an attention: every token attends to itself alone."""

    def __init__(self, config):
        super().__init__()
        bias = config.attention_bias or _value_has_bias(config)
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states, **_):
        return self.linear_attn(hidden_states), None


class DeciLMLinearMLP(nn.Module):
    """One linear layer in the place of a gated FFN."""

    def __init__(self, config):
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states):
        return self.linear_mlp(hidden_states)


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention and FFN, each Llama's own, linear, or absent."""

    def __init__(self, config, layer, cache_index):
        super().__init__()
        attention, ffn = config.block_configs[layer].attention, config.block_configs[layer].ffn
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = None
        if not attention.no_op:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if attention.replace_with_linear:
                self.self_attn = DeciLMLinearAttention(config)
            else:
                self.self_attn = DeciLMAttention(config, config.kv_heads(layer), cache_index)
        if not ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if ffn.replace_with_linear:
                self.mlp = DeciLMLinearMLP(config)
            else:
                sizes = copy.copy(config)
                sizes.intermediate_size = config.ffn_width(layer)
                self.mlp = LlamaMLP(sizes)

    def forward(self, hidden_states, **context):
        if self.self_attn is not None:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **context)[0]
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    """Embedding, heterogeneous layers, final norm; runs as Llama does."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": LlamaAttention}

    def __init__(self, config):
        super(LlamaModel, self).__init__(config)  # Llama's own would make its layers alike
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers, attentions = nn.ModuleList(), 0
        for layer, entry in enumerate(config.block_configs):
            self.layers.append(DeciLMDecoderLayer(config, layer, cache_index=attentions))
            attentions += not (entry.attention.no_op or entry.attention.replace_with_linear)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """A DeciLM model with its language-model head."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _value_has_bias(config):
    return getattr(config, "qkv_bias", config.attention_bias)
