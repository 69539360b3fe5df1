"""Numbers derived from a run's records, which tables, figures and warnings share. Units stay as they are inside."""

from typing import NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant, Option, Variant
from puzzle_core.report.accuracies import kept_in_the_mean
from puzzle_core.report.report_inputs import ModelResult, ReportInputs
from puzzle_core.search.record_tables import score_table
from puzzle_core.search.search_record import FoundArchitecture, Prediction
from puzzle_core.search.tables import OUTSIDE
from puzzle_core.work import Timing


class Comparison(NamedTuple):
    """One time of one model, predicted from the costs of its blocks and measured on the whole model."""

    model: str
    phase: str
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative to what was measured; positive where the prediction is too slow."""
        return self.predicted_ms / self.measured_ms - 1


class LayerFact(NamedTuple):
    """What one layer of the child is, what it costs in quality, and its time beside the parent's."""

    layer: int
    block: BlockVariant
    score: float
    attention_ms: float
    ffn_ms: float
    parent_attention_ms: float
    parent_ffn_ms: float

    @property
    def parent_ms(self) -> float:
        """Prefill and decode of the parent's layer."""
        return self.parent_attention_ms + self.parent_ffn_ms

    @property
    def saved_ms(self) -> float:
        """Prefill and decode that this layer saves; negative where its variants are slower than the parent's."""
        return self.parent_ms - self.attention_ms - self.ffn_ms

    @property
    def saved_share(self) -> float:
        """The part of the parent's layer that is saved: nothing of a layer without subblocks."""
        return self.saved_ms / self.parent_ms if self.parent_ms else 0.0


def total_ms(timing: Timing) -> float:
    """Prefill and the whole generation."""
    return timing.prefill_ms + timing.decode_ms


def hardware(inputs: ReportInputs) -> str:
    """What the times hold for."""
    return inputs.costs.hardware if inputs.costs else inputs.spec.target.name


def headline(inputs: ReportInputs) -> dict[str, float]:
    """The child beside its parent: ratios, and the KL. Speed-ups are missing where nothing was timed, and shares of
    accuracy on benchmarks where fewer than two were answered."""
    parent, child = inputs.parent, inputs.child
    facts = {
        "parameters_ratio": child.parameters / parent.parameters,
        "memory_ratio": child.memory_bytes / parent.memory_bytes,
        "kl_nats_per_token": child.evaluation.kl_nats_per_token,
        "perplexity_ratio": child.evaluation.perplexity / parent.evaluation.perplexity,
        "top1_agreement": child.evaluation.top1_agreement,
    }
    if parent.evaluation.top1_accuracy:
        facts["top1_kept"] = child.evaluation.top1_accuracy / parent.evaluation.top1_accuracy
    for metric, share in kept_in_the_mean(inputs, child).items():
        facts[f"benchmarks_kept_{metric.replace(' ', '_').replace(',', '_')}"] = share
    if parent.timing and child.timing:
        facts["speedup_prefill"] = parent.timing.prefill_ms / child.timing.prefill_ms
        if child.timing.decode_ms:
            facts["speedup_decode"] = parent.timing.decode_ms / child.timing.decode_ms
        facts["speedup_end_to_end"] = total_ms(parent.timing) / total_ms(child.timing)
    return facts


def comparisons(inputs: ReportInputs) -> list[Comparison]:
    """Predicted and measured times of every model that has both, and of the parent when costs were measured."""
    pairs = []
    if inputs.costs and inputs.costs.source == "measured":
        pairs.append(("parent, with the costs", inputs.search.parent, inputs.costs.parent))
    for model in inputs.models:
        prediction = predicted(inputs, model.architecture)
        if model.timing and prediction:
            pairs.append((model.name, prediction, model.timing))
    return [
        Comparison(name, phase, predicted_ms, measured_ms)
        for name, prediction, timing in pairs
        for phase, predicted_ms, measured_ms in (
            ("prefill", prediction.prefill_ms, timing.prefill_ms),
            ("decode", prediction.decode_ms, timing.decode_ms),
        )
        if measured_ms
    ]


def predicted(inputs: ReportInputs, architecture: Architecture) -> Prediction | None:
    """The predicted costs of an architecture that the search met."""
    if architecture == inputs.parent.architecture:
        return inputs.search.parent
    search = inputs.search
    met = (*search.solutions, *search.baselines, *search.frontier)
    return next((solution.prediction for solution in met if solution.architecture == architecture), None)


def measured(inputs: ReportInputs, architecture: Architecture) -> ModelResult | None:
    """The model as assembled, not distilled, with this architecture."""
    return next((model for model in inputs.models if model.architecture == architecture), None)


def block_time_share(inputs: ReportInputs, prediction: Prediction) -> float:
    """Predicted time in blocks as a share of the parent's, what lies outside not counted."""
    outside = inputs.search.times.get(OUTSIDE, 0.0)
    return (prediction.total_ms - outside) / (inputs.search.parent.total_ms - outside)


def scores(inputs: ReportInputs) -> dict[tuple[int, Option], float]:
    """The score of every layer and option, as the search saw it."""
    spec, shape = inputs.spec, inputs.shape
    objective = inputs.search.objective
    variants, scored = spec.served_variants(shape), inputs.scored_shape
    table = score_table(inputs.scores, spec.scoring.composition, objective, variants, scored)
    return {
        (layer, option): score
        for layer, scores in enumerate(table.layers)
        for option, score in scores.items()
        if option.block != table.parent.layers[layer]
    }


def layer_facts(inputs: ReportInputs) -> list[LayerFact]:
    """The child layer by layer."""
    table, own, scored = scores(inputs), inputs.shape.parent_block, inputs.scored_shape.parent_block
    options = inputs.chosen.architecture.options
    return [
        LayerFact(
            layer=layer,
            block=block,
            score=0.0 if block == scored(layer) or layer not in options else table[layer, options[layer]],
            attention_ms=_variant_ms(inputs, block.attention),
            ffn_ms=_variant_ms(inputs, block.ffn),
            parent_attention_ms=_variant_ms(inputs, own(layer).attention),
            parent_ffn_ms=_variant_ms(inputs, own(layer).ffn),
        )
        for layer, block in enumerate(inputs.chosen.architecture.layers)
    ]


def method_name(solution: FoundArchitecture) -> str:
    """The name that reports show for a search method."""
    names = {"mip": "MIP", "mip_no_op_only": "MIP, no-op only", "mip_lm_loss": "MIP on LM loss"}
    return names.get(solution.method, solution.method.replace("_", " "))


def _variant_ms(inputs: ReportInputs, variant: Variant) -> float:
    return inputs.search.times.get(str(variant), 0.0)
