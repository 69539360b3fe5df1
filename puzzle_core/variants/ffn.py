"""Initial weights of FFN variants from the parent's FFN (Puzzle paper, appendix A).

Legend: D hidden width, I intermediate width, C kept channels.
"""

import torch

from puzzle_core.architecture import Variant
from puzzle_core.state_dict import State

PREFIXES = ("mlp.", "post_attention_layernorm.")


def initial_ffn(layer: State, variant: Variant, contribution_I: torch.Tensor | None) -> State:
    """The starting weights of an FFN variant; the parent's own for the parent's own variant.

    Args:
        layer: the parent layer's tensors.
        contribution_I: how much each channel contributes; the lowest are dropped. None where none can be dropped.
    """
    own = {name: tensor for name, tensor in layer.items() if name.startswith(PREFIXES)}
    if variant.kind == "no_op":
        return {}
    if variant.kind == "linear":
        return {"post_attention_layernorm.weight": own["post_attention_layernorm.weight"], **_linear(own)}
    assert contribution_I is not None, f"{variant}: nothing says which channels to keep"
    kept_C = contribution_I.topk(variant.size).indices.sort().values
    for name in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
        if f"mlp.{name}" in own:
            own[f"mlp.{name}"] = own[f"mlp.{name}"][kept_C].contiguous()
    own["mlp.down_proj.weight"] = own["mlp.down_proj.weight"][:, kept_C].contiguous()
    return own


def _linear(own: State) -> State:
    """W = W_down . W_up, the gate ignored."""
    down_DI = own["mlp.down_proj.weight"].float()
    state = {"mlp.linear_mlp.weight": down_DI @ own["mlp.up_proj.weight"].float()}
    if "mlp.down_proj.bias" in own:
        state["mlp.linear_mlp.bias"] = down_DI @ own["mlp.up_proj.bias"].float() + own["mlp.down_proj.bias"].float()
    return state
