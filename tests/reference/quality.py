"""Scores and evaluations from whole logits in float64: deepcopy the model, change it, run everything."""

import copy
from typing import Any

import torch

State = dict[str, torch.Tensor]


class SelfOnlyAttention(torch.nn.Module):
    """A linear attention in the place of transformers' attention."""

    def __init__(self, state: State):
        super().__init__()
        self.weight, self.bias = state["self_attn.linear_attn.weight"], state.get("self_attn.linear_attn.bias")

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(hidden_states, self.weight, self.bias), None


class Nothing(torch.nn.Module):
    """A no-op attention or FFN: what it adds to the residual is 0."""

    def forward(self, x: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None, **_: Any) -> Any:
        return torch.zeros_like(x) if x is not None else (torch.zeros_like(hidden_states), None)


def with_attention(model: Any, layer: int, kind: str, state: State) -> Any:
    """A copy of transformers' model with one attention replaced."""
    model = copy.deepcopy(model)
    block = model.model.layers[layer]
    if kind == "no_op":
        block.self_attn = Nothing()
        return model
    block.input_layernorm.weight.data = state["input_layernorm.weight"]
    if kind == "linear":
        block.self_attn = SelfOnlyAttention(state)
        return model
    kv_heads = len(state["self_attn.k_proj.weight"]) // block.self_attn.head_dim
    block.self_attn.num_key_value_groups = model.config.num_attention_heads // kv_heads
    return _with_weights(model, block.self_attn, state, ("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")


def with_ffn(model: Any, layer: int, kind: str, state: State) -> Any:
    """A copy of transformers' model with one FFN replaced."""
    model = copy.deepcopy(model)
    block = model.model.layers[layer]
    if kind == "no_op":
        block.mlp = Nothing()
        return model
    block.post_attention_layernorm.weight.data = state["post_attention_layernorm.weight"]
    if kind == "linear":
        block.mlp = torch.nn.Linear(model.config.hidden_size, model.config.hidden_size, bias=False)
        block.mlp.weight.data = state["mlp.linear_mlp.weight"]
        return model
    return _with_weights(model, block.mlp, state, ("gate_proj", "up_proj", "down_proj"), "mlp")


def comparison(parent_BTV: torch.Tensor, child_BTV: torch.Tensor, ids_BT: torch.Tensor) -> dict[str, float]:
    """Everything that scoring and evaluation say of two models, token by token."""
    parent, child = parent_BTV.double().log_softmax(-1), child_BTV.double().log_softmax(-1)
    divergence, parent_loss, child_loss, right, agreed = 0.0, 0.0, 0.0, 0, 0
    windows, tokens = ids_BT.shape
    for window in range(windows):
        for token in range(tokens):
            p, c = parent[window, token], child[window, token]
            divergence += float((p.exp() * (p - c)).sum())
            agreed += int(p.argmax() == c.argmax())
            if token + 1 < tokens:
                following = ids_BT[window, token + 1]
                parent_loss, child_loss = parent_loss - float(p[following]), child_loss - float(c[following])
                right += int(c.argmax() == following)
    predictions = windows * (tokens - 1)
    return {
        "kl": divergence / (windows * tokens),
        "agreement": agreed / (windows * tokens),
        "loss": child_loss / predictions,
        "loss_increase": (child_loss - parent_loss) / predictions,
        "accuracy": right / predictions,
    }


def _with_weights(model: Any, module: Any, state: State, projections: tuple[str, ...], prefix: str) -> Any:
    for name in projections:
        getattr(module, name).weight.data = state[f"{prefix}.{name}.weight"]
    return model
