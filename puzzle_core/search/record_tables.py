"""The tables of a run: scores and costs from the records of its stages. No torch."""

from collections.abc import Callable, Mapping, Sequence

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.errors import CoverageError
from puzzle_core.search.tables import OUTSIDE, CostRow, CostTable, Option, ScoreTable
from puzzle_core.sizes import kv_copies, outside_parameters, variant_size
from puzzle_core.spec import VariantsSpec
from puzzle_core.work import CostRecord, ScoreRecord, Timing

NOTHING = "attn:no_op+ffn:no_op"
OBJECTIVES: dict[str, Callable[[ScoreRecord], float | None]] = {
    "kl": lambda score: score.kl_nats_per_token,
    "lm_loss": lambda score: score.lm_loss_increase_nats_per_token,
    "disagreement": lambda score: None if score.top1_agreement is None else 1 - score.top1_agreement,
}


def score_table(
    scores: Sequence[ScoreRecord],
    composition: str,
    objective: str,
    variants: VariantsSpec,
    shape: ModelShape,
    base: Architecture | None = None,
) -> ScoreTable:
    """Scores by layer and block variant; with single subblocks, a block's score is the sum of its subblocks'.

    Estimates have no increase of the next-token loss, and neither has a table of them.

    Args:
        base: the child that blocks were scored in, instead of the parent: scores are then what a block adds to those of
            the child itself, and may be negative.

    Raises:
        CoverageError: a block variant of the space has no score for this objective.
    """
    base = base or Architecture.of_parent(shape)
    without_loss = objective == "lm_loss" or any(score.lm_loss_increase_nats_per_token is None for score in scores)
    return ScoreTable(
        parent=shape.parent_block,
        layers=_layers(scores, composition, objective, variants, shape, base),
        objective=objective,
        lm_loss=None if without_loss else _layers(scores, composition, "lm_loss", variants, shape, base),
    )


def _layers(
    scores: Sequence[ScoreRecord],
    composition: str,
    objective: str,
    variants: VariantsSpec,
    shape: ModelShape,
    base: Architecture,
) -> tuple[dict[Option, float], ...]:
    values = {(score.layer, score.block): OBJECTIVES[objective](score) for score in scores}
    measured = {place: value for place, value in values.items() if value is not None}
    of_base = measured.get((0, base.layers[0]), 0.0)

    def of_block(layer: int, block: BlockVariant) -> float:
        if block == base.layers[layer]:
            return 0.0
        if (layer, block) not in measured:
            raise CoverageError(
                f"layer {layer} {block} has no score for the objective {objective}: score it exactly, or take it out "
                "of `variants`"
            )
        return measured[layer, block] - of_base

    def of_subblocks(layer: int, block: BlockVariant) -> float:
        own = base.layers[layer]
        return sum(of_block(layer, own.with_variant(variant)) for variant in block.subblocks)

    score = of_block if composition == "pairs" else of_subblocks
    return tuple(
        {Option(block): score(layer, block) for block in variants.blocks_of_layer(layer, shape)}
        for layer in range(shape.layers)
    )


def unscored_table(variants: VariantsSpec, shape: ModelShape) -> ScoreTable:
    """The space with no scores: enough to ask whether the limits can hold."""
    blocks = [variants.blocks_of_layer(layer, shape) for layer in range(shape.layers)]
    return ScoreTable(shape.parent_block, tuple({Option(block): 0.0 for block in space} for space in blocks))


def cost_table(variants: VariantsSpec, shape: ModelShape, costs: Mapping[tuple[str, int], CostRecord]) -> CostTable:
    """Costs by subblock variant: sizes exact from shapes, times from the records of (scenario, batch size).

    Raises:
        CoverageError: a record lacks a variant of the space.
    """
    record = next(iter(costs.values()))
    distinct = {v for layer in range(shape.layers) for found in variants.of_layer(layer, shape) for v in found}
    outside = outside_parameters(shape)
    outside_bytes = outside * (record.embedding_bytes or record.weight_bytes)
    rows = [CostRow(OUTSIDE, _sizes(outside, 0, record) | {"parameter_bytes": outside_bytes})]
    for variant in sorted(distinct):
        size = variant_size(shape, variant)
        entries = size.kv_entries_per_token * kv_copies(variant.kv_heads, record.tensor_parallel)
        rows.append(CostRow(str(variant), _sizes(size.parameters, entries, record)))
    for (scenario, batch_size), record in costs.items():
        rows.append(CostRow(OUTSIDE, _times(record.outside), batch_size=batch_size, scenario=scenario))
        for variant in sorted(distinct):
            times = _times(_timing(record, variant, scenario, batch_size))
            rows.append(CostRow(str(variant), times, batch_size=batch_size, scenario=scenario))
        if record.no_ffn:
            rows.append(CostRow(NOTHING, _times(None), batch_size=batch_size, scenario=scenario))
    return CostTable(tuple(rows))


def _sizes(parameters: int, kv_entries: float, record: CostRecord) -> dict[str, float]:
    return {
        "parameters": parameters,
        "parameter_bytes": parameters * record.weight_bytes,
        "kv_bytes_per_token": kv_entries * record.kv_bytes,
    }


def _times(timing: Timing | None) -> dict[str, float]:
    return {"prefill_ms": timing.prefill_ms if timing else 0.0, "decode_ms": timing.decode_ms if timing else 0.0}


def _timing(record: CostRecord, variant: Variant, scenario: str, batch_size: int) -> Timing | None:
    """None for a no-op, which takes no time, unless the engine spends some."""
    if variant.is_empty:
        return record.no_ffn if variant.subblock == "ffn" else None
    if str(variant) not in record.variants:
        raise CoverageError(f"no cost of {variant} in scenario {scenario} at batch size {batch_size}")
    return record.variants[str(variant)]
