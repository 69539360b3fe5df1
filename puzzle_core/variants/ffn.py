"""Initial weights of FFN variants from the parent's FFN (Puzzle paper, appendix A).

The rows of kinds.py name these functions.

Legend: D hidden width, I intermediate width, C kept channels.
"""

import torch

from puzzle_core.families.family import FAMILIES
from puzzle_core.state_dict import State
from puzzle_core.variants.kinds import ParentShape
from puzzle_core.variants.projections import ffn_rows, read_parts, write_parts

CUTS = 32
"""Cuts of an iteratively pruned FFN."""


def pruned_ffn(layer: State, shape: ParentShape, width: int, contribution_I: torch.Tensor | None = None) -> State:
    """An FFN of the channels that contribute most, in their order; the parent's own at its own width.

    Args:
        layer: the parent layer's tensors.
        contribution_I: how much each channel contributes; the lowest are dropped.
    """
    assert contribution_I is not None, f"FFN of width {width}: nothing says which channels to keep"
    return _with_channels(layer, shape, contribution_I.topk(width).indices.sort().values)


def iteratively_pruned_ffn(layer: State, shape: ParentShape, width: int, inner_NI: torch.Tensor) -> State:
    """An FFN whose channels were dropped in CUTS cuts, with contributions measured again after each.

    A contribution is by how much the squared error of the output grows without the channel, given those dropped before.

    Args:
        inner_NI: what enters the down projection, for N tokens.
    """
    down = f"{FAMILIES[shape.family].ffn_names.path('down')}.weight"
    x_NI = inner_NI.float()
    down_DI = layer[down].to(x_NI)
    alone_I = x_NI.square().sum(0) * down_DI.square().sum(0)
    is_kept_I = torch.ones(shape.ffn_width, dtype=torch.bool, device=x_NI.device)
    for cut in range(CUTS):
        left = width + (shape.ffn_width - width) * (CUTS - 1 - cut) // CUTS
        error_ND = x_NI[:, ~is_kept_I] @ down_DI[:, ~is_kept_I].T
        growth_I = alone_I + 2 * (x_NI * (error_ND @ down_DI)).sum(0)
        kept_C = growth_I.masked_fill(~is_kept_I, -torch.inf).topk(left).indices
        is_kept_I = torch.zeros_like(is_kept_I).index_fill(0, kept_C, True)
    return _with_channels(layer, shape, is_kept_I.nonzero().flatten().cpu())


def _with_channels(layer: State, shape: ParentShape, kept_C: torch.Tensor) -> State:
    """The parent's FFN with these of its channels."""
    state, names = _ffn_tensors(layer, shape), FAMILIES[shape.family].ffn_names
    parts = read_parts(state, names, ffn_rows(names, shape.ffn_width))
    state |= write_parts({name: tensor[kept_C].contiguous() for name, tensor in parts.items()}, names)
    down = f"{names.path('down')}.weight"
    state[down] = state[down][:, kept_C].contiguous()
    return state


def linear_ffn(layer: State, shape: ParentShape, size: int, contribution_I: torch.Tensor | None = None) -> State:
    """W = W_down . W_up, the gate ignored."""
    parent, names = _ffn_tensors(layer, shape), FAMILIES[shape.family].ffn_names
    parts = read_parts(parent, names, ffn_rows(names, shape.ffn_width))
    down, linear = names.path("down"), f"{names.module}.linear_mlp"
    down_DI = parent[f"{down}.weight"].float()
    state = {
        **{name: tensor for name, tensor in parent.items() if not name.startswith(f"{names.module}.")},
        f"{linear}.weight": down_DI @ parts["up.weight"].float(),
    }
    if f"{down}.bias" in parent:
        bias_D = down_DI @ parts["up.bias"].float()
        state[f"{linear}.bias"] = bias_D + parent[f"{down}.bias"].float()
    return state


def _ffn_tensors(layer: State, shape: ParentShape) -> State:
    """The tensors of the parent's FFN and of its norms."""
    prefixes = FAMILIES[shape.family].ffn_prefixes
    return {name: tensor for name, tensor in layer.items() if name.startswith(prefixes)}
