"""FFN fusion: which FFNs of a child become one, and what child that gives (METHOD section 7). No torch.

FFNs with no attention between them run one after the other: x1 = x + F1(x), x2 = x1 + F2(x1). Fused they run side by
side on the input of the first, x2 ~ x + F1(x) + F2(x), which is one FFN of the sum of their widths.
"""

from collections.abc import Sequence

from puzzle_core.architecture import Architecture, ModelShape, Option, Variant
from puzzle_core.errors import SpecError
from puzzle_core.families.family import FAMILIES


def fusible_runs(options: Sequence[Option]) -> list[range]:
    """The layers of a child that become one, run by run: those from an FFN on with no attention in between.

    A run has two FFNs or more, and starts and ends with one. Other layers are runs of one.
    """
    runs = list[range]()
    for number, option in enumerate(options):
        follows = runs and options[runs[-1].start].block.ffn.ffn_width and option.block.attention.is_empty
        if follows and option.block.ffn.ffn_width:
            runs[-1] = range(runs[-1].start, number + 1)
        elif not (follows and option.block.ffn.is_empty and _goes_on(options[number + 1 :])):
            runs.append(range(number, number + 1))
    return runs


def _goes_on(following: Sequence[Option]) -> bool:
    """Whether the next layer that is not empty has an FFN and no attention."""
    blocks = (option.block for option in following)
    block = next((block for block in blocks if not (block.attention.is_empty and block.ffn.is_empty)), None)
    return block is not None and block.attention.is_empty and block.ffn.ffn_width > 0


def fused(architecture: Architecture) -> Architecture:
    """The architecture with the FFNs of each run as one, in the place of all of the run's layers."""
    options = list(architecture.options.values())
    return Architecture.of_options(_fused(options[run.start : run.stop]) for run in fusible_runs(options))


def _fused(run: Sequence[Option]) -> Option:
    if len(run) == 1:
        return run[0]
    wide = Variant("ffn", "sized", sum(option.block.ffn.ffn_width for option in run))
    return Option(run[0].block.with_variant(wide), sum(option.span for option in run))


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
