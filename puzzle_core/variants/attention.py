"""Initial weights of attention variants from the parent's attention (Puzzle paper, appendix A).

State dicts are by the names within a layer: `self_attn.q_proj.weight`, `input_layernorm.weight` and so on.
Legend: D hidden width, H heads, K KV heads, G heads per KV head, d head width.
"""

import torch

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.state_dict import State

PREFIXES = ("self_attn.", "input_layernorm.")


def initial_attention(layer: State, shape: ModelShape, variant: Variant) -> State:
    """The starting weights of an attention variant; the parent's own for the parent's own variant.

    Args:
        layer: the parent layer's tensors.
        variant: any attention variant that `shape.check` accepts; a no-op has no weights.
    """
    own = {name: tensor for name, tensor in layer.items() if name.startswith(PREFIXES)}
    if variant.kind == "no_op":
        return {}
    if variant.kind == "linear":
        return {"input_layernorm.weight": own["input_layernorm.weight"], **_linear(own, shape)}
    for projection in ("k_proj", "v_proj"):
        for part in ("weight", "bias"):
            name = f"self_attn.{projection}.{part}"
            if name in own:
                own[name] = mean_pool(own[name], variant.size, shape.head_dim)
    return own


def mean_pool(rows: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Average adjacent KV heads until `kv_heads` are left.

    Args:
        rows: (K*d, ...) rows of a K or V projection.

    Returns:
        (kv_heads*d, ...); `rows` itself when there is nothing to merge.
    """
    if rows.shape[0] == kv_heads * head_dim:
        return rows
    grouped = rows.float().view(kv_heads, -1, head_dim, *rows.shape[1:])
    return grouped.mean(1).flatten(0, 1).to(rows.dtype)


def _linear(own: State, shape: ModelShape) -> State:
    """W = W_O . expand(W_V): every token attends to itself alone, so its value goes straight to the output."""
    out_DHd = own["self_attn.o_proj.weight"].float()
    state = {"self_attn.linear_attn.weight": out_DHd @ _expand(own["self_attn.v_proj.weight"], shape)}
    if "self_attn.v_proj.bias" in own or "self_attn.o_proj.bias" in own:
        bias_D = torch.zeros(shape.hidden)
        if "self_attn.v_proj.bias" in own:
            bias_D = out_DHd @ _expand(own["self_attn.v_proj.bias"], shape)
        state["self_attn.linear_attn.bias"] = bias_D + own.get("self_attn.o_proj.bias", torch.zeros(())).float()
    return state


def _expand(values_Kd: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Repeat each KV head's rows for every head of its group: (K*d, ...) to (H*d, ...)."""
    grouped = values_Kd.float().view(shape.kv_heads, shape.head_dim, *values_Kd.shape[1:])
    return grouped.repeat_interleave(shape.heads // shape.kv_heads, dim=0).flatten(0, 1)
