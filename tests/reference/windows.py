"""Attention within a window, token by token, from the weights of a Llama's attention."""

import torch


def attention(
    state: dict[str, torch.Tensor], normalised_TD: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor, window: int
) -> torch.Tensor:
    """What an attention adds to the residual stream: token t sees tokens t - window + 1 to t. (T, D)."""
    tokens, head_dim = cos_Td.shape
    query, key, value = (
        (normalised_TD @ state[f"self_attn.{name}_proj.weight"].T).view(tokens, -1, head_dim) for name in "qkv"
    )
    query, key = (_rotated(part, cos_Td, sin_Td) for part in (query, key))
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    out = torch.zeros(tokens, heads, head_dim)
    for t in range(tokens):
        seen = range(max(0, t - window + 1), t + 1)
        for head in range(heads):
            logits = torch.stack([query[t, head] @ key[s, head // group] for s in seen]) / head_dim**0.5
            shares = logits.softmax(0)
            out[t, head] = sum(share * value[s, head // group] for share, s in zip(shares, seen, strict=True))
    return out.flatten(1) @ state["self_attn.o_proj.weight"].T


def _rotated(part_THd: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor) -> torch.Tensor:
    first, second = part_THd.chunk(2, dim=-1)
    return part_THd * cos_Td[:, None] + torch.cat([-second, first], dim=-1) * sin_Td[:, None]
