"""Initial weights of variants and channel contributions, number by number."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def pooled_heads(rows: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Every kept head is the mean of its group of adjacent heads."""
    group = len(rows) // head_dim // kv_heads
    pooled = torch.zeros(kv_heads * head_dim, *rows.shape[1:])
    for head in range(kv_heads):
        for row in range(head_dim):
            merged = [rows[(head * group + member) * head_dim + row] for member in range(group)]
            pooled[head * head_dim + row] = sum(merged) / group
    return pooled


def contributions(directory: Path, ids_NT: torch.Tensor) -> list[torch.Tensor]:
    """Mean of |x_i| times the norm of the down projection's column, from hooks on transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    entered: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        for window in ids_NT.long():
            model(input_ids=window.unsqueeze(0))
    found = []
    for number, layer in enumerate(model.model.layers):
        states = torch.cat(entered[number :: len(model.model.layers)]).flatten(0, 1)
        found.append(states.abs().mean(0) * layer.mlp.down_proj.weight.detach().square().sum(0).sqrt())
    return found
