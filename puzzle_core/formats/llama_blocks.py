"""What a parent has that formats made for Llama's block (a DeciLM directory, GGUF of arch deci) cannot hold."""

from puzzle_core.architecture import ModelShape
from puzzle_core.families.family import FAMILIES


def unlike_llama(shape: ModelShape) -> list[str]:
    """The reasons why no child of such a parent can be exported; empty if there are none."""
    family, reasons = FAMILIES[shape.family], []
    if fields := family.unlike_llama:
        reasons.append(f"its family {shape.family} has {', '.join(fields)}, which the format has no place for")
    if shape.qk_norm:
        reasons.append(f"its family {shape.family} normalises queries and keys, which the format has no place for")
    if shape.windows:
        reasons.append("its layers attend within a sliding window, which the format has no place for")
    return reasons
