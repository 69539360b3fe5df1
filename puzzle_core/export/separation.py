"""Joint projections taken apart, since the formats that are written have every projection by itself."""

from collections.abc import Collection
from typing import NamedTuple

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.families.family import FAMILIES
from puzzle_core.variants.projections import ENDS, attention_rows, ffn_rows, sharing


class Rows(NamedTuple):
    """Rows of a stored tensor: its name, the first row, and the one behind the last."""

    name: str
    start: int
    stop: int


def separated(stored: Collection[str], architecture: Architecture, shape: ModelShape) -> dict[str, Rows]:
    """The parts of joint projections by their names in `Family.separate`; empty where a family has none.

    Args:
        stored: the names of a checkpoint's tensors.
    """
    family, found = FAMILIES[shape.family], {}
    apart = family.separate
    for number, block in enumerate(architecture.layers):
        for names, written, rows in (
            (family.attention_names, apart.attention_names, attention_rows(shape, block.attention.kv_heads)),
            (family.ffn_names, apart.ffn_names, ffn_rows(family.ffn_names, block.ffn.ffn_width)),
        ):
            for projection, parts in sharing(names, rows).items():
                start = 0
                for part in parts if len(parts) > 1 else ():
                    for end in ENDS:
                        name = f"model.layers.{number}.{projection}.{end}"
                        if name in stored:
                            written_name = f"model.layers.{number}.{written.path(part)}.{end}"
                            found[written_name] = Rows(name, start, start + rows[part])
                    start += rows[part]
    return found
