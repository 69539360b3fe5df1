"""Initial weights of FFN variants from the parent's FFN (Puzzle paper, appendix A).

The rows of kinds.py name these functions.

Legend: D hidden width, I intermediate width, C kept channels.
"""

import torch

from puzzle_core.families.family import FAMILIES
from puzzle_core.state_dict import State
from puzzle_core.variants.kinds import ParentShape


def pruned_ffn(layer: State, shape: ParentShape, width: int, contribution_I: torch.Tensor | None = None) -> State:
    """An FFN of the channels that contribute most, in their order; the parent's own at its own width.

    Args:
        layer: the parent layer's tensors.
        contribution_I: how much each channel contributes; the lowest are dropped.
    """
    assert contribution_I is not None, f"FFN of width {width}: nothing says which channels to keep"
    state = _ffn_tensors(layer, shape)
    kept_C = contribution_I.topk(width).indices.sort().values
    for name in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
        if f"mlp.{name}" in state:
            state[f"mlp.{name}"] = state[f"mlp.{name}"][kept_C].contiguous()
    state["mlp.down_proj.weight"] = state["mlp.down_proj.weight"][:, kept_C].contiguous()
    return state


def linear_ffn(layer: State, shape: ParentShape, size: int, contribution_I: torch.Tensor | None = None) -> State:
    """W = W_down . W_up, the gate ignored."""
    parent = _ffn_tensors(layer, shape)
    down_DI = parent["mlp.down_proj.weight"].float()
    state = {
        **{name: tensor for name, tensor in parent.items() if not name.startswith("mlp.")},
        "mlp.linear_mlp.weight": down_DI @ parent["mlp.up_proj.weight"].float(),
    }
    if "mlp.down_proj.bias" in parent:
        bias_D = down_DI @ parent["mlp.up_proj.bias"].float()
        state["mlp.linear_mlp.bias"] = bias_D + parent["mlp.down_proj.bias"].float()
    return state


def _ffn_tensors(layer: State, shape: ParentShape) -> State:
    """The tensors of the parent's FFN and of its norms."""
    prefixes = FAMILIES[shape.family].ffn_prefixes
    return {name: tensor for name, tensor in layer.items() if name.startswith(prefixes)}
