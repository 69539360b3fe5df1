"""Warnings: sentences on suspicious results, for the person who accepts or rejects the child. None is an error."""

from collections.abc import Callable

from puzzle_core.architecture import EMPTY_BLOCK
from puzzle_core.report import derived
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.units import duration_text, number_text, percent_text, signed_percent_text, times_text
from puzzle_core.search.search_record import Prediction, SearchRecord
from puzzle_core.work import Timing

EMPTY_SHARE, TIME_ERROR, TIME_SPREAD, KL_MARGIN = 0.5, 0.15, 0.15, 0.05
"""A warning appears above these shares: empty layers, error of predicted times, spread of times, gain of a baseline."""

ALONE = ("time_to_first_token", "time_per_output_token")
"""Limits that what is timed says nothing of under continuous batching: it is a batch that runs alone."""
TIMED_LIMITS: dict[str, Callable[[Timing], float]] = {
    "time_to_first_token": lambda timing: timing.prefill_ms,
    "time_per_output_token": lambda timing: timing.decode_ms,
    "latency": derived.total_ms,
    "throughput": derived.total_ms,
}


def report_warnings(inputs: ReportInputs) -> list[str]:
    """Every sentence that applies, the most serious first."""
    return [
        *_child_not_faster(inputs),
        *exceeded_limits(inputs),
        *_worse_after_gkd(inputs),
        *_better_baselines(inputs),
        *_predictions_off(inputs),
        *_noisy_times(inputs),
        *_bld_learnt_nothing(inputs),
        *_estimated_scores(inputs),
        *search_warnings(inputs.search),
    ]


def search_warnings(search: SearchRecord) -> list[str]:
    """Sentences on the best architecture of a search, and the reasons for what the search left out."""
    return answer_warnings(search) + omissions(search)


def omissions(search: SearchRecord) -> list[str]:
    """The reasons for what a search left out."""
    return [f"Left out: {name}. {reason}" for name, reason in search.omissions.items()]


def answer_warnings(search: SearchRecord) -> list[str]:
    """Sentences on the best architecture of a search."""
    best = search.best
    layers = len(best.architecture.layers)
    covered = sum(span - 1 for _, span in best.architecture.spans)
    empty = sum(block == EMPTY_BLOCK for block in best.architecture.layers) - covered
    warnings = []
    if empty > EMPTY_SHARE * layers:
        warnings.append(
            f"{empty} of {layers} layers are empty: for such limits, a smaller parent may be the better start."
        )
    if best.score > search.largest_score:
        warnings.append(
            f"The score {number_text(best.score)} is above every measured score (at most "
            f"{number_text(search.largest_score)}): a sum of scores is least certain there. Assemble and evaluate the "
            "child before you trust it."
        )
    if not best.optimal:
        warnings.append(
            f"The search stopped after {duration_text(best.seconds)} with a gap of {percent_text(best.gap)}: a better "
            f"architecture may exist. Raise search.{'time_limit_s' if search.met_time_limit else 'node_limit'}."
        )
    if search.met_time_limit:
        warnings.append(
            "The clock cut a solve at search.time_limit_s: the same request may have another answer in another run. "
            "search.node_limit gives the same answer everywhere."
        )
    if search.accuracy:
        warnings.append(f"Computed costs: {search.accuracy}.")
    return warnings


def _child_not_faster(inputs: ReportInputs) -> list[str]:
    speedup = derived.headline(inputs).get("speedup_end_to_end")
    if speedup is None or speedup > 1:
        return []
    return [
        f"The child is not faster than its parent: measured end to end, it runs at {times_text(speedup)} the parent's "
        "speed."
    ]


def exceeded_limits(inputs: ReportInputs) -> list[str]:
    """Limits that the measured times exceed. A share refers to the measured time of the parent."""
    timing, parent = inputs.child.timing, inputs.parent.timing
    if timing is None or parent is None:
        return []
    warnings = []
    for use in inputs.search.best.limits:
        time_of = TIMED_LIMITS.get(use.name)
        if inputs.spec.scenario.batching == "continuous" and use.name in ALONE:
            continue
        if time_of is None or not use.usage or use.scenario != inputs.spec.scenario.name:
            continue
        predicted = inputs.search.best.prediction
        used = time_of(timing) / time_of(_as_timing(predicted))
        allowed = use.threshold / use.usage if use.sense == "at_most" else use.usage / use.threshold
        if use.text.rstrip().endswith("%"):
            allowed *= time_of(parent) / time_of(_as_timing(inputs.search.parent))
        if used > allowed:
            warnings.append(
                f"The limit on {use.name.replace('_', ' ')} holds as predicted, and not as measured: the child takes "
                f"{percent_text(used / allowed - 1)} more time than allowed."
            )
    return warnings


def _as_timing(predicted: Prediction) -> Timing:
    return Timing(prefill_ms=predicted.prefill_ms, decode_ms=predicted.decode_ms, prefill_spread=0.0, decode_spread=0.0)


def _worse_after_gkd(inputs: ReportInputs) -> list[str]:
    before, after = inputs.children[0].evaluation, inputs.child.evaluation
    if inputs.gkd is None or len(inputs.children) < 2 or after.kl_nats_per_token <= before.kl_nats_per_token:
        return []
    return [
        f"GKD made the child worse: its KL to the parent went from {number_text(before.kl_nats_per_token)} to "
        f"{number_text(after.kl_nats_per_token)} nats per token. Lower its learning rate, or raise its tokens."
    ]


def _better_baselines(inputs: ReportInputs) -> list[str]:
    best = derived.measured(inputs, inputs.search.best.architecture)
    if best is None:
        return []
    kl = best.evaluation.kl_nats_per_token
    better = [model for model in inputs.baselines if model.evaluation.kl_nats_per_token < (1 - KL_MARGIN) * kl]
    return [
        f"The baseline {model.name} has a lower measured KL ({number_text(model.evaluation.kl_nats_per_token)}) than "
        f"the architecture that the search chose ({number_text(kl)}), both before distillation: the library is weak, "
        "or scores do not add up here."
        for model in better
    ]


def _predictions_off(inputs: ReportInputs) -> list[str]:
    off = [c for c in derived.comparisons(inputs) if abs(c.error) > TIME_ERROR]
    if not off:
        return []
    some = ", ".join(f"{c.phase} of {c.model} {signed_percent_text(c.error)}" for c in off)
    return [
        f"Predicted times are more than {TIME_ERROR:.0%} off what was measured ({some}): the search decided with costs "
        "that do not hold for whole models."
    ]


def _noisy_times(inputs: ReportInputs) -> list[str]:
    noisy = [
        f"{phase} of {model.name} {percent_text(spread)}"
        for model in (inputs.parent, *inputs.children)
        if (timing := model.timing)
        for phase, spread in (("prefill", timing.prefill_spread), ("decode", timing.decode_spread))
        if spread > TIME_SPREAD
    ]
    if not noisy:
        return []
    return [f"Measured times spread widely over the rounds ({', '.join(noisy)}): measure again on a quiet machine."]


def _bld_learnt_nothing(inputs: ReportInputs) -> list[str]:
    idle = [f"layer {r.layer} {r.variant}" for r in inputs.bld if r.final_loss >= r.initial_loss]
    if not idle:
        return []
    some = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
    return [
        f"BLD did not lower the loss of {len(idle)} of {len(inputs.bld)} variants on held-back windows ({some}): they "
        f"keep their initial weights; try bld.optimizer.learning_rate {inputs.spec.bld.optimizer.learning_rate / 4:g}."
    ]


def _estimated_scores(inputs: ReportInputs) -> list[str]:
    if inputs.spec.scoring.method != "fisher":
        return []
    return [
        "Scores are estimates from gradients of the parent (scoring.method: fisher), and large ones are too low: use "
        "them to compare architectures, and trust the measured KL of the child."
    ]
