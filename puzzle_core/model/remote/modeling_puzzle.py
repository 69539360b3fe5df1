"""A Puzzle child: a decoder whose layers may differ, built from Hugging Face's own parts.

Attention, FFN, norm and rotary classes are those of the parent's family. `config.family` describes what they do not
decide: names of modules, names and places of norms, biases, and scalars. A layer without a subblock has no norm for it
either; a linear subblock keeps its norms (Puzzle paper, arXiv 2411.19146, section 2). The cache numbers real
attentions, not layers: transformers reads the past length from cache entry 0, which must exist even if layer 0 lost its
attention. An attention may have a window that is shorter than its layer's own; its part of the cache holds no more.

Legend: B batch, T tokens, D hidden width, V vocabulary.
"""

import copy
import functools
import importlib
import inspect

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_puzzle import PuzzleConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name of the KV cache in transformers: `past_key_values` before 5.24, `cache` since."""
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
"""What makes the mask of every kind of attention."""


def family_class(family: dict, part: str) -> type[nn.Module]:
    """Hugging Face's class of a family's `Attention`, `MLP`, `RMSNorm` or `RotaryEmbedding`."""
    name = family.get("module") or family["model_type"]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(module, family["class_prefix"] + part)


def attention_kinds(parent) -> list[str]:
    """The kind of every layer's attention; without `layer_types` in the config, a window is that of all layers."""
    same = "sliding_attention" if getattr(parent, "sliding_window", None) else "full_attention"
    return getattr(parent, "layer_types", None) or [same] * parent.num_hidden_layers


def own_window(parent, kind: str) -> int:
    """The window of a parent's kind of attention in tokens; 0 where it sees all."""
    return parent.sliding_window if kind == "sliding_attention" else 0


def has_bias(family: dict, projections: str, parent) -> bool:
    """Whether the `qkv`, `attention_out` or `mlp` projections of a parent have biases."""
    flag = family[f"{projections}_bias"]
    return bool(getattr(parent, flag, False)) if isinstance(flag, str) else flag


def scalar(family: dict, name: str, parent) -> float | None:
    """A scalar of the family, from the parent's config; None where the family has none."""
    key = family[f"{name}_key"]
    return getattr(parent, key) if key else None


def module_name(family: dict, subblock: str) -> str:
    """The name within a layer of the `attention` or the `ffn`: Llama's in a description from before it had names."""
    return family.get(f"{subblock}_names", {"module": {"attention": "self_attn", "ffn": "mlp"}[subblock]})["module"]


class LinearAttention(nn.Module):
    """One linear layer in the place of an attention: every token attends to itself alone."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One linear layer in the place of an FFN."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


class PuzzleBlock(nn.Module):
    """One layer of a child: attention and FFN subblock, each the family's own, linear, or absent."""

    def __init__(self, config: PuzzleConfig, parent, layer: int, cache_index: int = 0):
        super().__init__()
        block, family = config.block_configs[layer], config.family
        sizes, width = config.of_layer(parent, layer), parent.hidden_size
        self.attention_norms, self.ffn_norms = family["attention_norms"], family["ffn_norms"]
        self.attention_name, self.ffn_name = module_name(family, "attention"), module_name(family, "ffn")
        self.residual_scale = scalar(family, "residual_scale", parent)
        self.attention_kind = attention_kinds(parent)[layer]
        self.kv_heads = block["attention"]["num_key_value_heads"] or 0
        self.cache_index, own = cache_index, own_window(parent, self.attention_kind)
        self.window = min(filter(None, (block["attention"].get("sliding_window"), own)), default=0)
        """Tokens that a token sees, itself included; 0: all before it."""
        self.is_narrowed = self.window != own
        attention = ffn = None

        self._add_norms(self.attention_norms, parent, family, absent=block["attention"]["no_op"])
        if block["attention"]["replace_with_linear"]:
            bias = has_bias(family, "qkv", parent) or has_bias(family, "attention_out", parent)
            attention = LinearAttention(width, bias)
        elif not block["attention"]["no_op"]:
            attention = family_class(family, "Attention")(sizes, layer)
            attention.layer_idx = cache_index
        setattr(self, self.attention_name, attention)

        self._add_norms(self.ffn_norms, parent, family, absent=block["ffn"]["no_op"])
        if block["ffn"]["replace_with_linear"]:
            ffn = LinearMLP(width, has_bias(family, "mlp", parent))
        elif not block["ffn"]["no_op"]:
            ffn = family_class(family, "MLP")(sizes)
        setattr(self, self.ffn_name, ffn)

    @property
    def attention_subblock(self) -> nn.Module | None:
        """The attention, whatever its name in the family; None where the layer has none."""
        return getattr(self, self.attention_name)

    @property
    def ffn_subblock(self) -> nn.Module | None:
        """The FFN, whatever its name in the family; None where the layer has none."""
        return getattr(self, self.ffn_name)

    def attend(self, layer_input_BTD: torch.Tensor, **context) -> torch.Tensor:
        """The attention subblock with its residual connection."""
        if self.attention_subblock is None:
            return layer_input_BTD
        narrowed_mask = context.pop("narrowed_mask", None)
        if self.is_narrowed:
            context["attention_mask"] = narrowed_mask(self.window)
        output = self.attention_subblock(hidden_states=self.normalise_attention_input(layer_input_BTD), **context)[0]
        return self._add(layer_input_BTD, self._normalise(output, self.attention_norms["after"]))

    def feed(self, post_attention_BTD: torch.Tensor) -> torch.Tensor:
        """The FFN subblock with its residual connection."""
        if self.ffn_subblock is None:
            return post_attention_BTD
        output = self.ffn_subblock(self.normalise_ffn_input(post_attention_BTD))
        return self._add(post_attention_BTD, self._normalise(output, self.ffn_norms["after"]))

    def normalise_attention_input(self, layer_input_BTD: torch.Tensor) -> torch.Tensor:
        """What the attention sees of what enters the layer."""
        return self._normalise(layer_input_BTD, self.attention_norms["before"])

    def normalise_ffn_input(self, post_attention_BTD: torch.Tensor) -> torch.Tensor:
        """What the FFN sees of what leaves the attention subblock."""
        return self._normalise(post_attention_BTD, self.ffn_norms["before"])

    def forward(self, layer_input_BTD: torch.Tensor, **context) -> torch.Tensor:
        return self.feed(self.attend(layer_input_BTD, **context))

    def _add_norms(self, names: dict, parent, family: dict, absent: bool) -> None:
        for name in names.values():
            if name:
                norm = None if absent else family_class(family, "RMSNorm")(parent.hidden_size, eps=parent.rms_norm_eps)
                setattr(self, name, norm)

    def _normalise(self, hidden_BTD: torch.Tensor, norm: str | None) -> torch.Tensor:
        return getattr(self, norm)(hidden_BTD) if norm else hidden_BTD

    def _add(self, residual_BTD: torch.Tensor, output_BTD: torch.Tensor) -> torch.Tensor:
        if self.residual_scale is not None:
            output_BTD = output_BTD * self.residual_scale
        return residual_BTD + output_BTD


class PuzzlePreTrainedModel(PreTrainedModel):
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["PuzzleBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers, which fills rotary rates after loading, and here rates by kind of attention, too."""
        super()._init_weights(module)
        if isinstance(getattr(module, "rope_type", None), dict):
            for name, rates in type(module)(config=module.config).named_buffers():
                getattr(module, name).copy_(rates)


class PuzzleModel(PuzzlePreTrainedModel):
    """Embedding, heterogeneous blocks, final norm."""

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        parent, family = config.parent(), config.family
        self.parent_config = parent
        self.embedding_scale = scalar(family, "embedding_scale", parent)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        attentions = 0
        for layer in range(len(config.block_configs)):
            self.layers.append(PuzzleBlock(config, parent, layer, cache_index=attentions))
            attentions += self.layers[-1].kv_heads > 0
        norm = family_class(family, "RMSNorm")(config.hidden_size, eps=parent.rms_norm_eps)
        self.final_norm_name = family.get("final_norm", "norm")
        setattr(self, self.final_norm_name, norm)
        self.rotary_emb = family_class(family, "RotaryEmbedding")(config=parent)
        self.post_init()

    def cache(self) -> DynamicCache:
        """An empty KV cache; the parts of attentions with a window hold what these see."""
        cache = DynamicCache()
        self._fit(cache)
        return cache

    def _fit(self, cache: Cache | None) -> None:
        """Give an empty dynamic cache a part for every attention, of its window's length where it has one."""
        if type(cache) is not DynamicCache or any(layer.is_initialized for layer in cache.layers):
            return
        attending = (block for block in self.layers if block.kv_heads)
        parts = [DynamicSlidingWindowLayer(block.window) if block.window else DynamicLayer() for block in attending]
        cache.layers[: len(parts)] = parts

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, (B, T, D)."""
        embeddings = self.embed_tokens(input_ids)
        if self.config.family["embedding_sqrt_hidden"]:
            embeddings = embeddings * torch.tensor(self.config.hidden_size**0.5).to(embeddings)
        return embeddings if self.embedding_scale is None else embeddings * self.embedding_scale

    def normalise(self, final_BTD: torch.Tensor) -> torch.Tensor:
        """What the head sees of what leaves the last layer."""
        return getattr(self, self.final_norm_name)(final_BTD)

    def contexts(
        self,
        hidden_BTD: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, dict]:
        """By kind of attention, its mask and positions; some families rotate channels of each kind at other rates.

        `narrowed_mask` gives the mask of a window that is shorter than that of the kind.
        """
        parent, contexts = self.parent_config, {}
        masked = {"inputs_embeds": hidden_BTD, "attention_mask": attention_mask, "position_ids": position_ids}

        def part(**properties) -> dict:
            """The part of the cache of the first attention with these properties: masks take their sizes from it."""
            if cache is None or not hasattr(cache, "layers"):
                return {CACHE: cache}
            attending = (block for block in self.layers if block.kv_heads)
            like = (b.cache_index for b in attending if all(getattr(b, k) == v for k, v in properties.items()))
            one, index = copy.copy(cache), next(like, 0)
            one.layers = cache.layers[index : index + 1]
            return {CACHE: one}

        @functools.cache
        def narrowed_mask(window: int) -> torch.Tensor | None:
            seen = cache.get_seq_length() if cache is not None else 0
            kind = "sliding_attention" if seen + hidden_BTD.shape[1] > window else "full_attention"
            config = copy.copy(parent)
            config.sliding_window = window
            return MASKS[kind](config=config, **masked, **part(window=window))

        for kind in dict.fromkeys(attention_kinds(parent)):
            rates = {"layer_type": kind} if kind in (parent.rope_parameters or {}) else {}
            own = part(attention_kind=kind, is_narrowed=False)
            contexts[kind] = {
                "attention_mask": MASKS[kind](config=parent, **masked, **own),
                "position_ids": position_ids,
                "position_embeddings": self.rotary_emb(hidden_BTD, position_ids=position_ids, **rates),
                "narrowed_mask": narrowed_mask,
            }
        return contexts

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
        """As in transformers, except for two things.

        `inputs_embeds` are what enters the first layer, so they are not scaled; `hidden_states` are the outputs of all
        layers, before the final norm. The cache is accepted as `past_key_values` and as `cache`, in every version of
        transformers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        self._fit(cache)
        if any(block.is_narrowed for block in self.layers) and "flash" in self.config._attn_implementation:
            raise ValueError("layers have windows of their own, which are masks: use attn_implementation='sdpa'")
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past).unsqueeze(0)
        contexts = self.contexts(hidden, position_ids, attention_mask, cache)
        context |= {CACHE: cache}
        states = []
        for block in self.layers:
            hidden = block(hidden, **context | contexts[block.attention_kind])
            states.append(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=self.normalise(hidden),
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: cache},
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    """A Puzzle child with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.model = PuzzleModel(config)
        parent = config.parent()
        self.logits_divisor = scalar(config.family, "logits_divisor", parent)
        self.logits_softcap = scalar(config.family, "logits_softcap", parent)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def head(self, normalised_BTD: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of what leaves the final norm."""
        logits = self.lm_head(normalised_BTD)
        if self.logits_divisor is not None:
            logits = logits / self.logits_divisor
        if self.logits_softcap is not None:
            logits = torch.tanh(logits / self.logits_softcap) * self.logits_softcap
        return logits

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
        logits = self.head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        filled = {CACHE: getattr(output, CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states, **filled)
