"""The tables of a run: scores and costs from the records of its stages. No torch."""

from collections.abc import Callable, Mapping, Sequence

from puzzle_core.architecture import Architecture, ModelShape, Option, Variant
from puzzle_core.errors import CoverageError
from puzzle_core.search.tables import OUTSIDE, CostRow, CostTable, ScoreTable
from puzzle_core.sizes import outside_parameters, variant_size
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
    reference: Architecture | None = None,
) -> ScoreTable:
    """Scores by layer and block variant; with single subblocks, a block's score is the sum of its subblocks'.

    Estimates have no increase of the next-token loss, and neither has a table of them.

    Args:
        base: the child that blocks were scored in, instead of the parent: scores are then what a block adds to those of
            the child itself, and may be negative.
        reference: whose values shares in limits are of; the parent's by default.

    Raises:
        CoverageError: a block variant of the space has no score for this objective.
    """
    base = base or Architecture.of_parent(shape)
    without_loss = objective == "lm_loss" or any(score.lm_loss_increase_nats_per_token is None for score in scores)
    return ScoreTable(
        parent=Architecture.of_parent(shape),
        layers=_layers(scores, composition, objective, variants, shape, base),
        objective=objective,
        lm_loss=None if without_loss else _layers(scores, composition, "lm_loss", variants, shape, base),
        reference=reference,
    )


def _layers(
    scores: Sequence[ScoreRecord],
    composition: str,
    objective: str,
    variants: VariantsSpec,
    shape: ModelShape,
    base: Architecture,
) -> tuple[dict[Option, float], ...]:
    values = {(score.layer, score.option): OBJECTIVES[objective](score) for score in scores}
    measured = {place: value for place, value in values.items() if value is not None}
    of_base = measured.get((0, Option(base.layers[0])), 0.0)

    def of_option(layer: int, option: Option) -> float:
        if option == Option(base.layers[layer]):
            return 0.0
        if (layer, option) not in measured:
            raise CoverageError(
                f"layer {layer} {option} has no score for the objective {objective}: score it exactly, or take it out "
                "of `variants`"
            )
        return measured[layer, option] - of_base

    def score(layer: int, option: Option) -> float:
        if composition == "pairs" or option.span > 1:
            return of_option(layer, option)
        changed = map(base.layers[layer].with_variant, option.block.subblocks)
        return sum(of_option(layer, Option(block)) for block in changed)

    return tuple(
        {option: score(layer, option) for option in variants.options_of_layer(layer, shape)}
        for layer in range(shape.layers)
    )


def unscored_table(variants: VariantsSpec, shape: ModelShape, reference: Architecture | None = None) -> ScoreTable:
    """The space with no scores: enough to ask whether the limits can hold."""
    spaces = [variants.options_of_layer(layer, shape) for layer in range(shape.layers)]
    layers = tuple(dict.fromkeys(space, 0.0) for space in spaces)
    return ScoreTable(Architecture.of_parent(shape), layers, reference=reference)


def cost_table(variants: VariantsSpec, shape: ModelShape, costs: Mapping[tuple[str, int], CostRecord]) -> CostTable:
    """Costs by subblock variant: sizes exact from shapes, times from the records of (scenario, batch size).

    Raises:
        CoverageError: a record lacks a variant of the space.
    """
    record = next(iter(costs.values()))
    distinct = {v for layer in range(shape.layers) for found in variants.of_layer(layer, shape) for v in found}
    rows = [CostRow(OUTSIDE, _sizes(outside_parameters(shape), 0, record))]
    for variant in sorted(distinct):
        size = variant_size(shape, variant)
        rows.append(CostRow(str(variant), _sizes(size.parameters, size.kv_entries_per_token, record)))
    for (scenario, batch_size), record in costs.items():
        rows.append(CostRow(OUTSIDE, _times(record.outside), batch_size=batch_size, scenario=scenario))
        for variant in sorted(distinct):
            times = _times(_timing(record, variant, scenario, batch_size))
            rows.append(CostRow(str(variant), times, batch_size=batch_size, scenario=scenario))
        if record.no_ffn:
            rows.append(CostRow(NOTHING, _times(None), batch_size=batch_size, scenario=scenario))
    return CostTable(tuple(rows))


def _sizes(parameters: int, kv_entries: int, record: CostRecord) -> dict[str, float]:
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
