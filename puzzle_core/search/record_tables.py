"""The tables of a run: scores and costs from the records of its stages. No torch."""

from collections.abc import Callable, Mapping, Sequence

from puzzle_core.architecture import Architecture, ModelShape, Option, Variant
from puzzle_core.errors import CoverageError
from puzzle_core.search.tables import OUTSIDE, CostRow, CostTable, ScoreTable
from puzzle_core.sizes import kv_copies, outside_parameters, variant_size
from puzzle_core.spec import VariantsSpec
from puzzle_core.work import CostRecord, ScoreRecord, Timing

KV_COLUMN = "kv_bytes_per_token"
NOTHING = "attn:no_op+ffn:no_op"
_SUMMED = ("kl_nats_per_token", "lm_loss_increase_nats_per_token", "top1_agreement")
OBJECTIVES: dict[str, Callable[[ScoreRecord], float | None]] = {
    "kl": lambda score: score.kl_nats_per_token,
    "lm_loss": lambda score: score.lm_loss_increase_nats_per_token,
    "disagreement": lambda score: None if score.top1_agreement is None else 1 - score.top1_agreement,
}


def with_long_scores(scores: Sequence[ScoreRecord], longs: Sequence[ScoreRecord], weight: float) -> list[ScoreRecord]:
    """Scores to which those of the same blocks on longer windows are added, `weight` times.

    Raises:
        CoverageError: a block has no score on longer windows.
    """
    by_place = {(long.layer, long.option): long for long in longs}
    added = []
    for score in scores:
        if (long := by_place.get((score.layer, score.option))) is None:
            raise CoverageError(f"layer {score.layer} {score.option} has no score on longer windows: score it again")
        values = {name: getattr(score, name) + weight * getattr(long, name) for name in _SUMMED}
        values["top1_agreement"] -= weight  # so that the disagreements add up
        added.append(score.model_copy(update=values))
    return added


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


def cost_table(
    variants: VariantsSpec,
    shape: ModelShape,
    costs: Mapping[tuple[str, int], CostRecord],
    request_tokens: Mapping[str, int] | None = None,
) -> CostTable:
    """Costs by subblock variant: sizes exact from shapes, times from the records of (scenario, batch size).

    A window caps the KV cache, so the bytes per token within one hold for the requests of a scenario. A layer with a
    window of its own has rows of its own.

    Args:
        request_tokens: prompt and generated tokens of a request by scenario, where something has a window.

    Raises:
        CoverageError: a record lacks a variant of the space.
    """
    record = next(iter(costs.values()))
    places = _places(variants, shape)
    outside = outside_parameters(shape)
    outside_bytes = outside * (record.embedding_bytes or record.weight_bytes)
    rows = [CostRow(OUTSIDE, _sizes(outside, record) | {"parameter_bytes": outside_bytes, KV_COLUMN: 0.0})]
    for variant in sorted({variant for variant, *_ in places}):
        rows.append(CostRow(str(variant), _sizes(variant_size(shape, variant).parameters, record)))
    for variant, seen, layer in places:
        copies = kv_copies(variant.kv_heads, record.tensor_parallel)
        entry_bytes = variant_size(shape, variant).kv_entries_per_token * record.kv_bytes * copies
        if not seen.window:
            rows.append(CostRow(str(variant), {KV_COLUMN: entry_bytes}, layer=layer))
        for scenario in dict.fromkeys(scenario for scenario, _ in costs) if seen.window else ():
            tokens = (request_tokens or {})[scenario]
            values = {KV_COLUMN: entry_bytes * seen.seen(tokens) / tokens}
            rows.append(CostRow(str(variant), values, layer=layer, scenario=scenario))
    for (scenario, batch_size), record in costs.items():
        rows.append(CostRow(OUTSIDE, _times(record.outside), batch_size=batch_size, scenario=scenario))
        for variant, seen, layer in places:
            times = _times(_timing(record, seen, scenario, batch_size))
            rows.append(CostRow(str(variant), times, layer=layer, batch_size=batch_size, scenario=scenario))
        if record.no_ffn:
            rows.append(CostRow(NOTHING, _times(None), batch_size=batch_size, scenario=scenario))
    return CostTable(tuple(rows))


def _places(variants: VariantsSpec, shape: ModelShape) -> list[tuple[Variant, Variant, int | None]]:
    """The distinct variants, each as it runs, and the layer where that differs between layers; None for all layers."""
    runs: dict[Variant, dict[int, Variant]] = {}
    for layer in range(shape.layers):
        for found in variants.of_layer(layer, shape):
            for variant in found:
                runs.setdefault(variant, {})[layer] = shape.in_layer(layer, variant)
    places: list[tuple[Variant, Variant, int | None]] = []
    for variant, by_layer in sorted(runs.items()):
        if len(distinct := set(by_layer.values())) == 1:
            places.append((variant, distinct.pop(), None))
        else:
            places += [(variant, seen, layer) for layer, seen in by_layer.items()]
    return places


def _sizes(parameters: int, record: CostRecord) -> dict[str, float]:
    return {"parameters": parameters, "parameter_bytes": parameters * record.weight_bytes}


def _times(timing: Timing | None) -> dict[str, float]:
    return {"prefill_ms": timing.prefill_ms if timing else 0.0, "decode_ms": timing.decode_ms if timing else 0.0}


def _timing(record: CostRecord, variant: Variant, scenario: str, batch_size: int) -> Timing | None:
    """None for a no-op, which takes no time, unless the engine spends some."""
    if variant.is_empty:
        return record.no_ffn if variant.subblock == "ffn" else None
    if str(variant) not in record.variants:
        raise CoverageError(f"no cost of {variant} in scenario {scenario} at batch size {batch_size}")
    return record.variants[str(variant)]
