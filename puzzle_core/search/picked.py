"""The part of a search space that a search picks: what coupled BLD trains in its second stage (METHOD section 3)."""

from collections import Counter

from puzzle_core.architecture import BlockVariant, ModelShape, Option, Variant
from puzzle_core.search.problem_builder import COVERED
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import VariantRange, VariantsSpec

MOST = {"attn": 4, "ffn": 3}
"""Variants of a subblock that a layer keeps at most, the parent's own among them (Puzzle paper, 4 x 3)."""


def picked_variants(record: SearchRecord, variants: VariantsSpec, shape: ModelShape) -> VariantsSpec:
    """The space of the variants that a search picks, layer by layer, in the best architecture first.

    Then those count that its other solutions and the points of its frontier have most often, and then runners-up.
    Blocks that span layers are offered as before.
    """
    found = [solution.architecture for solution in (*record.solutions, *record.frontier)]
    ranges = []
    for layer in range(shape.layers):
        weighed = [found[0]] * len(found) + found[1:]  # so that nothing outweighs the best architecture
        picks = [one.options[layer].block for one in weighed if layer in one.options]
        own = shape.parent_block(layer).subblocks
        kept = [variant for subblock in own for variant in _most_frequent(subblock, picks, _runners_up(record, layer))]
        ranges.append(
            VariantRange(
                first_layer=layer,
                last_layer=layer,
                kv_heads=(),
                ffn_widths=(),
                linear=False,
                no_op=False,
                ids=tuple(kept),
            )
        )
    return variants.model_copy(update={"layers": tuple(ranges)})


def _most_frequent(own: Variant, picks: list[BlockVariant], others: list[BlockVariant]) -> list[Variant]:
    """The variants of a subblock that are picked most often, without the parent's own."""
    counts = Counter(variant for block in picks for variant in block.subblocks if variant.subblock == own.subblock)
    ranked = sorted(counts, key=lambda variant: (-counts[variant], variant.rank))
    ranked += [variant for block in others for variant in block.subblocks if variant.subblock == own.subblock]
    return list(dict.fromkeys(variant for variant in ranked if variant != own))[: MOST[own.subblock] - 1]


def _runners_up(record: SearchRecord, layer: int) -> list[BlockVariant]:
    """What the layer would take without its own option; none where an earlier layer's option would cover it."""
    others = [text for other in record.runner_ups if other.layer == layer for text in other.others]
    return [Option.parse(text).block for text in others if not text.startswith(COVERED)]
