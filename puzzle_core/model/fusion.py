"""FFN fusion: the FFNs of consecutive layers without attention become one wide FFN (METHOD section 7).

FFNs with no attention between them run one after the other: x1 = x + F1(x), x2 = x1 + F2(x1). Fused they run side by
side on the input of the first, x2 ~ x + F1(x) + F2(x), which is one FFN of the sum of their widths. Each FFN has a norm
with weights of its own in front; these go into its projections, and the fused FFN's norm has ones.

Legend: D hidden width.
"""

from collections.abc import Sequence

import torch

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.errors import SpecError
from puzzle_core.families.family import FAMILIES
from puzzle_core.state_dict import State
from puzzle_core.variants.projections import ffn_rows, read_parts, write_parts


def fusible_runs(architecture: Architecture) -> list[range]:
    """The layers whose FFNs become one, run by run: an FFN, and those that follow it with no attention in between.

    Empty layers within a run belong to it.
    """
    runs, current = list[range](), range(0)
    for layer, block in enumerate(architecture.layers):
        if current and block.attention.is_empty and (block.ffn.ffn_width or block.ffn.is_empty):
            current = range(current.start, layer + 1 if block.ffn.ffn_width else current.stop)
        elif block.ffn.ffn_width:
            runs, current = [*runs, current], range(layer, layer + 1)
        else:
            runs, current = [*runs, current], range(0)
    return [run for run in [*runs, current] if sum(architecture.layers[layer].ffn.ffn_width > 0 for layer in run) > 1]


def check_fusible(shape: ModelShape) -> None:
    """Refuse a family whose FFNs cannot run side by side as one.

    Raises:
        SpecError: the output of each FFN is normalised by itself.
    """
    norms = FAMILIES[shape.family].ffn_norms
    if norms.after or not norms.before:
        raise SpecError(
            f"child.fuse_ffn: family {shape.family} normalises the output of every FFN by itself, so a sum of FFNs is "
            "no FFN: remove child.fuse_ffn"
        )


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
