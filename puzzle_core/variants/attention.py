"""Initial weights of attention variants from the parent's attention (Puzzle paper, appendix A).

The rows of kinds.py name these functions. State dicts are by the names within a layer, which the family gives:
`self_attn.q_proj.weight`, `input_layernorm.weight` and so on.

Legend: D hidden width, H heads, K KV heads, G heads per KV head, d head width.
"""

from collections.abc import Callable, Iterable

import torch

from puzzle_core.families.family import FAMILIES
from puzzle_core.state_dict import State
from puzzle_core.variants.kinds import ParentShape
from puzzle_core.variants.projections import attention_rows, read_parts, write_parts


def pooled_attention(layer: State, shape: ParentShape, kv_heads: int, contribution_I: None = None) -> State:
    """An attention of fewer KV heads, each the mean of a group of adjacent ones; the parent's own at its own number.

    Args:
        layer: the parent layer's tensors.
        kv_heads: a divisor of the parent's.
        contribution_I: of no use here.
    """
    return _with_heads(layer, shape, lambda rows: mean_pool(rows, kv_heads, shape.head_dim))


def first_heads(layer: State, shape: ParentShape, kv_heads: int, inner_NI: torch.Tensor) -> State:
    """An attention of the first of each group of adjacent KV heads."""
    kept = range(0, shape.kv_heads, shape.kv_heads // kv_heads)
    return _with_heads(layer, shape, lambda rows: _heads(rows, kept, shape.head_dim))


def largest_heads(layer: State, shape: ParentShape, kv_heads: int, inner_NI: torch.Tensor) -> State:
    """An attention of the KV head of each group whose query heads contribute most to the output.

    The contribution of a query head is the mean over tokens of the norm of what it adds, x W_O.

    Args:
        inner_NI: what enters the output projection, for N tokens.
    """
    output = f"{FAMILIES[shape.family].attention_names.path('output')}.weight"
    x_NHd = inner_NI.float().view(len(inner_NI), shape.heads, shape.head_dim)
    out_DHd = layer[output].to(x_NHd).view(-1, shape.heads, shape.head_dim)
    squares_NH = torch.einsum("nhd,hde,nhe->nh", x_NHd, torch.einsum("ohd,ohe->hde", out_DHd, out_DHd), x_NHd)
    contribution_KG = squares_NH.clamp(min=0).sqrt().mean(0).view(shape.kv_heads, -1)
    groups = contribution_KG.sum(1).view(kv_heads, -1)
    first = torch.arange(0, shape.kv_heads, groups.shape[1], device=groups.device)
    kept = (first + groups.argmax(1)).tolist()
    return _with_heads(layer, shape, lambda rows: _heads(rows, kept, shape.head_dim))


def _with_heads(layer: State, shape: ParentShape, merged: Callable[[torch.Tensor], torch.Tensor]) -> State:
    """The parent's attention with other rows for all that has rows by KV head."""
    state, names = _attention_tensors(layer, shape), FAMILIES[shape.family].attention_names
    parts = read_parts(state, names, attention_rows(shape, shape.kv_heads))
    if shape.qk_norm_whole:
        parts |= {"key_norm.weight": state[f"{names.path('key_norm')}.weight"]}
    changed = {name: merged(tensor) if name.startswith(("key", "value")) else tensor for name, tensor in parts.items()}
    return state | write_parts(changed, names)


def linear_attention(layer: State, shape: ParentShape, size: int, contribution_I: None = None) -> State:
    """W = W_O . expand(W_V): every token attends to itself alone, so its value goes straight to the output."""
    parent, names = _attention_tensors(layer, shape), FAMILIES[shape.family].attention_names
    parts = read_parts(parent, names, attention_rows(shape, shape.kv_heads))
    output, linear = names.path("output"), f"{names.module}.linear_attn"
    out_DHd = parent[f"{output}.weight"].float()
    state = {
        **{name: tensor for name, tensor in parent.items() if not name.startswith(f"{names.module}.")},
        f"{linear}.weight": out_DHd @ _expand(parts["value.weight"], shape),
    }
    if "value.bias" in parts or f"{output}.bias" in parent:
        bias_D = torch.zeros(shape.hidden)
        if "value.bias" in parts:
            bias_D = out_DHd @ _expand(parts["value.bias"], shape)
        state[f"{linear}.bias"] = bias_D + parent.get(f"{output}.bias", torch.zeros(())).float()
    return state


def mean_pool(rows: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Average adjacent KV heads until `kv_heads` are left.

    Args:
        rows: (K*d, ...) rows of a K or V projection, or a norm's weights (K*d,) of all keys together.

    Returns:
        (kv_heads*d, ...); `rows` itself when there is nothing to merge.
    """
    if rows.shape[0] == kv_heads * head_dim:
        return rows
    grouped = rows.float().view(kv_heads, -1, head_dim, *rows.shape[1:])
    return grouped.mean(1).flatten(0, 1).to(rows.dtype)


def _heads(rows: torch.Tensor, kept: Iterable[int], head_dim: int) -> torch.Tensor:
    """The rows of some heads, in their order."""
    return torch.cat([rows[head * head_dim : (head + 1) * head_dim] for head in kept])


def _attention_tensors(layer: State, shape: ParentShape) -> State:
    """The tensors of the parent's attention and of its norms."""
    prefixes = FAMILIES[shape.family].attention_prefixes
    return {name: tensor for name, tensor in layer.items() if name.startswith(prefixes)}


def _expand(values_Kd: torch.Tensor, shape: ParentShape) -> torch.Tensor:
    """Repeat each KV head's rows for every head of its group: (K*d, ...) to (H*d, ...)."""
    grouped = values_Kd.float().view(shape.kv_heads, shape.head_dim, *values_Kd.shape[1:])
    return grouped.repeat_interleave(shape.heads // shape.kv_heads, dim=0).flatten(0, 1)
