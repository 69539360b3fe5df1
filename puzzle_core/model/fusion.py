"""The tensors of FFNs that are fused to one (METHOD section 7); puzzle_core/fusible.py says which.

Each FFN has a norm with weights of its own in front; these go into its projections, and the fused FFN's norm has ones.

Legend: D hidden width.
"""

from collections.abc import Sequence

import torch

from puzzle_core.architecture import ModelShape
from puzzle_core.families.family import FAMILIES
from puzzle_core.state_dict import State
from puzzle_core.variants.projections import ffn_rows, read_parts, write_parts


def fused_ffn(states: Sequence[State], widths: Sequence[int], shape: ModelShape) -> State:
    """The tensors of an FFN that gives the sum of FFNs of the same input, float32.

    Args:
        states: the tensors of the FFNs and of their norms, by their names within a layer.
        widths: of the FFNs.
    """
    family = FAMILIES[shape.family]
    names, norm, down = family.ffn_names, f"{family.ffn_norms.before}.weight", family.ffn_names.path("down")
    wide: dict[str, list[torch.Tensor]] = {}
    for state, width in zip(states, widths, strict=True):
        for part, tensor in read_parts(state, names, ffn_rows(names, width)).items():
            scaled = tensor.float() * state[norm].float() if part.endswith(".weight") else tensor.float()
            wide.setdefault(part, []).append(scaled)
    fused = write_parts({part: torch.cat(tensors) for part, tensors in wide.items()}, names)
    fused[f"{down}.weight"] = torch.cat([state[f"{down}.weight"].float() for state in states], dim=1)
    if f"{down}.bias" in states[0]:
        fused[f"{down}.bias"] = torch.stack([state[f"{down}.bias"].float() for state in states]).sum(0)
    return fused | {norm: torch.ones_like(states[0][norm].float())}
