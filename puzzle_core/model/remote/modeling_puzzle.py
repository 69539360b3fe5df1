"""A Puzzle child: a Llama-pattern decoder whose layers may differ, built from Hugging Face's own parts.

Attention, FFN, norm and rotary classes are those of the parent's family; this file only decides which of them a
layer has. A layer without a subblock has no norm for it either; a linear subblock keeps its norm (Puzzle paper,
arXiv 2411.19146, section 2). The cache numbers real attentions, not layers: transformers reads the past length
from cache entry 0, which must exist even if layer 0 lost its attention.

Legend: B batch, T tokens, D hidden width.
"""

import importlib
import inspect

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_puzzle import PuzzleConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name of the KV cache in transformers: `past_key_values` before 5.24, `cache` since."""

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}


def family_class(family: str, part: str) -> type[nn.Module]:
    """Hugging Face's class of a family's `Attention`, `MLP`, `RMSNorm` or `RotaryEmbedding`."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, FAMILIES[family] + part)


class LinearAttention(nn.Module):
    """One linear layer in the place of an attention: every token attends to itself alone."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One linear layer in the place of a gated FFN."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


def attention_output_has_bias(parent) -> bool:
    """Whether the value or output projection of the parent's attention has a bias, so that a linear one needs it."""
    return parent.model_type == "qwen2" or bool(getattr(parent, "attention_bias", False))


class PuzzleBlock(nn.Module):
    """One layer of a child: attention half and FFN half, each the family's own, linear, or absent."""

    def __init__(self, config: PuzzleConfig, parent, layer: int, cache_index: int = 0):
        super().__init__()
        own, sizes = config.block_configs[layer], config.of_layer(parent, layer)
        family, width = parent.model_type, parent.hidden_size
        norm, eps = family_class(family, "RMSNorm"), parent.rms_norm_eps
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = None
        if not own["attention"]["no_op"]:
            self.input_layernorm = norm(width, eps=eps)
            if own["attention"]["replace_with_linear"]:
                self.self_attn = LinearAttention(width, bias=attention_output_has_bias(parent))
            else:
                self.self_attn = family_class(family, "Attention")(sizes, layer)
                self.self_attn.layer_idx = cache_index
        if not own["ffn"]["no_op"]:
            self.post_attention_layernorm = norm(width, eps=eps)
            if own["ffn"]["replace_with_linear"]:
                self.mlp = LinearMLP(width, bias=bool(getattr(parent, "mlp_bias", False)))
            else:
                self.mlp = family_class(family, "MLP")(sizes)

    def attend(self, hidden_BTD: torch.Tensor, **context) -> torch.Tensor:
        """The attention half with its residual connection."""
        if self.self_attn is None:
            return hidden_BTD
        return hidden_BTD + self.self_attn(hidden_states=self.input_layernorm(hidden_BTD), **context)[0]

    def feed(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The FFN half with its residual connection."""
        if self.mlp is None:
            return hidden_BTD
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))

    def forward(self, hidden_BTD: torch.Tensor, **context) -> torch.Tensor:
        return self.feed(self.attend(hidden_BTD, **context))


class PuzzlePreTrainedModel(PreTrainedModel):
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["PuzzleBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class PuzzleModel(PuzzlePreTrainedModel):
    """Embedding, heterogeneous blocks, final norm."""

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        parent = config.parent()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        attentions = 0
        for layer, own in enumerate(config.block_configs):
            self.layers.append(PuzzleBlock(config, parent, layer, cache_index=attentions))
            attentions += own["attention"]["num_key_value_heads"] is not None
        self.norm = family_class(parent.model_type, "RMSNorm")(config.hidden_size, eps=parent.rms_norm_eps)
        self.rotary_emb = family_class(parent.model_type, "RotaryEmbedding")(config=parent)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **context,
    ) -> BaseModelOutputWithPast:
        """As in transformers; `hidden_states` are the outputs of all layers, before the final norm.

        The cache is accepted as `past_key_values` and as `cache`, in every version of transformers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        context |= {"attention_mask": mask, "position_ids": position_ids, CACHE: cache}
        context["position_embeddings"] = self.rotary_emb(hidden, position_ids=position_ids)
        states = []
        for block in self.layers:
            hidden = block(hidden, **context)
            states.append(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden),
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: cache},
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    """A Puzzle child with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **context,
    ) -> CausalLMOutputWithPast:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **context,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        filled = {CACHE: getattr(output, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states, **filled)
