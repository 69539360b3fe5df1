"""Projections by the part that they play in a subblock, whether the family has them apart or several in one.

Legend: a part is a field of the family's names (`query`, `gate`); its tensors are `query.weight` and `query.bias`.
"""

from collections.abc import Mapping

import torch

from puzzle_core.families.family import FfnNames, SubblockNames
from puzzle_core.state_dict import State
from puzzle_core.variants.kinds import ParentShape

ENDS = ("weight", "bias")


def attention_rows(shape: ParentShape, kv_heads: int) -> dict[str, int]:
    """Rows of the parts that enter an attention."""
    key_value = kv_heads * shape.head_dim
    return {"query": shape.heads * shape.head_dim, "key": key_value, "value": key_value}


def ffn_rows(names: FfnNames, width: int) -> dict[str, int]:
    """Rows of the parts that enter an FFN's activation."""
    return dict.fromkeys(names.wide, width)


def sharing(names: SubblockNames, rows: Mapping[str, int]) -> dict[str, list[str]]:
    """By projection, the parts that it holds, in the order of their rows."""
    held: dict[str, list[str]] = {}
    for part in rows:
        held.setdefault(names.path(part), []).append(part)
    return held


def read_parts(state: State, names: SubblockNames, rows: Mapping[str, int]) -> State:
    """The tensors of parts; of a projection that several share, each gets its rows.

    Args:
        state: a subblock's tensors by their names within the layer.
        rows: the parts and how many rows each has, in the order in which they share a projection.
    """
    parts: State = {}
    for name, held in sharing(names, rows).items():
        for end in ENDS:
            if f"{name}.{end}" in state:
                tensor = state[f"{name}.{end}"]
                cut = torch.split(tensor, [rows[part] for part in held]) if len(held) > 1 else (tensor,)
                parts |= {f"{part}.{end}": rows_of_part for part, rows_of_part in zip(held, cut, strict=True)}
    return parts


def write_parts(parts: State, names: SubblockNames) -> State:
    """The tensors by their names within the layer, of parts in the order of `read_parts`."""
    held: dict[str, list[torch.Tensor]] = {}
    for name, tensor in parts.items():
        part, end = name.split(".")
        held.setdefault(f"{names.path(part)}.{end}", []).append(tensor)
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in held.items()}
