"""Tables of the report as rows of strings, and the final table as plain text for a terminal."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from puzzle_core.architecture import Architecture, Option, Variant
from puzzle_core.report import derived
from puzzle_core.report.accuracies import Accuracy, accuracies, can_be_kept, kept, kept_in_the_mean, means
from puzzle_core.report.report_inputs import ModelResult, ReportInputs
from puzzle_core.report.units import (
    NONE,
    bytes_text,
    count_text,
    duration_text,
    kept_text,
    ms_text,
    number_text,
    percent_text,
    range_text,
    rate_text,
    signed_percent_text,
    speed_text,
    times_text,
)
from puzzle_core.search.search_record import FoundArchitecture, LimitPrice, LimitUse
from puzzle_core.work import BldRecord

LIMIT_COLUMNS = ("limit", "scenario", "asked for", "allowed", "predicted", "slack", "step", "gain of step")
OBJECTIVE_UNITS = {"kl": "KL, nats per token", "lm_loss": "LM loss, nats per token", "disagreement": "share of tokens"}


class Table(NamedTuple):
    """A table as strings; the first `text_columns` columns hold text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    note: str = ""


class _FinalRow(NamedTuple):
    """One row of the final table; `ratio` takes the parent's value and the child's."""

    name: str
    value: Callable[[ModelResult], float | None]
    text: Callable[[float], str]
    ratio: Callable[[float, float], str] | None


def format_final_table(inputs: ReportInputs) -> str:
    """The final table for a terminal: title, aligned columns, note."""
    return format_text(final_table(inputs))


def format_text(table: Table) -> str:
    """A table as plain text with aligned columns."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]

    def aligned(line: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if column < table.text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    body = [aligned(table.columns), rule, *(aligned(row) for row in table.rows)]
    return "\n".join([table.title, *body, *([table.note] if table.note else [])])


def final_table(inputs: ReportInputs) -> Table:
    """The parent and the child after each step: size, speed, quality, and ratios to the parent."""
    parent, children, scenario = inputs.parent, (*inputs.rounds, *inputs.children), inputs.spec.scenario
    rows = []
    for quantity in _quantities(inputs):
        parent_value = quantity.value(parent)
        cells = [quantity.name, NONE if parent_value is None else quantity.text(parent_value)]
        for child in children:
            value = quantity.value(child)
            ratio = quantity.ratio(parent_value, value) if quantity.ratio and parent_value and value else ""
            cells += [NONE if value is None else quantity.text(value), ratio]
        rows.append(tuple(cells))
    return Table(
        title="The child beside its parent",
        columns=("", parent.name, *(cell for child in children for cell in (child.name, "to the parent"))),
        rows=tuple(rows),
        note=f"Scenario {scenario.name}: {scenario.prompt_tokens:,} prompt and {scenario.generated_tokens:,} "
        f"generated tokens, batch size {inputs.batch_size}, on {derived.hardware(inputs)}. Memory is "
        "parameters plus KV cache at the full context of the batch; end to end is prefill plus decode, its rate counts "
        "generated tokens.",
    )


def benchmarks_table(inputs: ReportInputs) -> Table:
    """Accuracies of parent and children, and what is kept of the parent's; without rows if the spec names none."""
    parent, children = inputs.parent, (*inputs.rounds, *inputs.children)
    found = {
        model.name: {(a.benchmark, a.metric): a for a in [*accuracies(model), *means(inputs, model)]}
        for model in (parent, *children)
    }
    shares = {child.name: kept(parent, child) for child in children}
    for child in children:
        of_mean = kept_in_the_mean(inputs, child)
        shares[child.name] |= {(a.benchmark, a.metric): of_mean[a.metric] for a in means(inputs, child)}
    rows = []
    for place, accuracy in found[parent.name].items():
        cells = [*place, NONE if accuracy.items is None else f"{accuracy.items:,}", _accuracy_text(accuracy)]
        for child in children:
            share = shares[child.name].get(place)
            cells += [_accuracy_text(found[child.name].get(place)), NONE if share is None else percent_text(share)]
        rows.append(tuple(cells))
    return Table(
        title="Benchmarks",
        columns=("benchmark", "metric", "items", parent.name, *(c for child in children for c in (child.name, "kept"))),
        rows=tuple(rows),
        text_columns=2,
        note="Parent and children answer the same items; the likeliest choice is the answer, by length its likelihood "
        "per character. ± is the standard error over items. Kept is the child's accuracy over the parent's.",
    )


def _accuracy_text(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return NONE
    value, error = accuracy.value, accuracy.standard_error
    text = f"{value:.4f}" if can_be_kept(accuracy.metric) else number_text(value, 4)
    return text if error is None else f"{text} ± {error:.4f}"


def baselines_table(inputs: ReportInputs) -> Table:
    """The chosen architecture and those of other search methods at the same limits, before distillation."""
    search = inputs.search
    others = [(f"MIP, solution {rank}", solution) for rank, solution in enumerate(search.solutions[1:], start=2)]
    named = [("MIP (chosen)", search.best), *others, *((derived.method_name(f), f) for f in search.baselines)]
    rows = [_solution_row(inputs, name, solution) for name, solution in named]
    listed = {solution.architecture for _, solution in named}
    rows += [
        (model.name, NONE, *_quality_cells(inputs, model), NONE)
        for model in inputs.baselines
        if model.architecture not in listed
    ]
    return Table(
        title="Other ways to choose, at the same limits",
        columns=("method", "score predicted", "KL measured", "perplexity", "top-1 accuracy", "block time predicted"),
        rows=tuple(rows),
        note=f"The score is the sum over layers of replace-1-block scores ({OBJECTIVE_UNITS[search.objective]}); KL is "
        "measured on the assembled model before any distillation, in nats per token; block time is a share of the "
        "parent's, what lies outside the blocks not counted.",
    )


def shortlist_table(inputs: ReportInputs) -> Table:
    """Candidates that were assembled and measured; without rows if there are none."""
    refine = inputs.refine
    rows = [
        (
            f"round {candidate.round}, solution {candidate.rank}" + (" (chosen)" if number == refine.best else ""),
            number_text(candidate.solution.score),
            number_text(candidate.measured_kl),
            percent_text(derived.block_time_share(inputs, candidate.solution.prediction)),
        )
        for number, candidate in enumerate(refine.candidates if refine else ())
        if refine
    ]
    return Table(
        title="Shortlist: predicted and measured",
        columns=("candidate", "score predicted", "KL measured", "block time predicted"),
        rows=tuple(rows),
        note="Round 0 is the search over scores in the parent; later rounds score every block in the best child so "
        "far. KL is measured on the tokens of the scores, before any distillation.",
    )


def limits_table(inputs: ReportInputs) -> Table:
    """Every limit of the scenario: request, threshold, use of the chosen architecture, and slack."""
    return Table(
        title="Limits",
        columns=LIMIT_COLUMNS,
        rows=tuple(limit_row(use, inputs.search.prices) for use in inputs.search.best.limits),
        text_columns=3,
        note="Shares are of the parent's own predicted value. Block times leave out what lies outside the blocks.",
    )


def layers_table(inputs: ReportInputs) -> Table:
    """The child layer by layer."""
    layers = derived.layer_facts(inputs)
    rows = [
        (
            str(fact.layer),
            str(fact.block.attention),
            str(fact.block.ffn),
            number_text(fact.score),
            ms_text(fact.saved_ms),
            percent_text(fact.saved_share),
        )
        for fact in layers
    ]
    saved, parent = sum(fact.saved_ms for fact in layers), sum(fact.parent_ms for fact in layers)
    sums = number_text(sum(fact.score for fact in layers)), ms_text(saved), percent_text(saved / parent)
    rows.append(("all", *_variant_counts(inputs.chosen.architecture), *sums))
    scored_in = f"the {inputs.rounds[-1].name}" if inputs.rounds else "the parent"
    return Table(
        title="The architecture, layer by layer",
        columns=("layer", "attention", "FFN", "score", "time saved", "of the layer"),
        rows=tuple(rows),
        text_columns=3,
        note=f"Score: what this block alone costs in {scored_in} ({OBJECTIVE_UNITS[inputs.search.objective]}). Time "
        "saved: prefill plus decode, predicted.",
    )


def predicted_table(inputs: ReportInputs) -> Table:
    """Times predicted from single blocks, and measured times of whole models."""
    rows = [
        (c.model, c.phase, ms_text(c.predicted_ms), ms_text(c.measured_ms), signed_percent_text(c.error))
        for c in derived.comparisons(inputs)
    ]
    return Table(
        title="Predicted against measured times",
        columns=("model", "phase", "predicted", "measured", "error"),
        rows=tuple(rows),
        text_columns=2,
        note="Predicted: the sum of the measured costs of the blocks and of what lies outside them. Measured: the "
        "whole model. “With the costs” was timed in the same rounds as the blocks.",
    )


def bld_table(inputs: ReportInputs) -> Table:
    """BLD losses of every variant: medians over layers, and the best and the worst layer."""
    by_variant: dict[Variant | Option, list[BldRecord]] = defaultdict(list)
    for record in inputs.bld:
        by_variant[record.variant].append(record)
    rows = []
    for variant in sorted(by_variant, key=variant_order):
        records = sorted(by_variant[variant], key=lambda record: record.final_loss)
        initial = statistics.median(record.initial_loss for record in records)
        final = statistics.median(record.final_loss for record in records)
        extremes = [f"{number_text(r.final_loss)} (layer {r.layer})" for r in (records[0], records[-1])]
        rows.append((str(variant), str(len(records)), number_text(initial), number_text(final), *extremes))
    seconds, tokens = sum(r.seconds for r in inputs.bld), sum(r.tokens for r in inputs.bld)
    return Table(
        title="Blockwise local distillation",
        columns=("variant", "layers", "first loss, median", "last loss, median", "best layer", "worst layer"),
        rows=tuple(rows),
        note=f"Loss: squared error of the block's output over the square of the parent's, 0 is perfect. "
        f"{len(inputs.bld):,} trainings, {count_text(tokens)} tokens, {duration_text(seconds)} of work in all.",
    )


def variant_order(variant: Variant | Option) -> tuple[Any, ...]:
    """Sort key: attention before FFN, the widest variant first, no-op last; then options by their span and halves."""
    if isinstance(variant, Option):
        return "option", variant.span, *(half.rank for half in variant.block.subblocks)
    return variant.subblock, *variant.rank


def _quantities(inputs: ReportInputs) -> list[_FinalRow]:
    scenario, batch = inputs.spec.scenario, inputs.batch_size
    prompt, steps = batch * scenario.prompt_tokens, batch * (scenario.generated_tokens - 1)

    def prefill(model: ModelResult) -> float | None:
        return model.timing.prefill_ms if model.timing else None

    def decode(model: ModelResult) -> float | None:
        return model.timing.decode_ms or None if model.timing else None

    def whole(model: ModelResult) -> float | None:
        return derived.total_ms(model.timing) if model.timing else None

    def rate(tokens: int, time: Callable[[ModelResult], float | None]) -> Callable[[ModelResult], float | None]:
        return lambda model: tokens / value * 1e3 if (value := time(model)) else None

    def share(parent: float, child: float) -> str:
        return percent_text(child / parent)

    def times(parent: float, child: float) -> str:
        return times_text(child / parent)

    def speed(parent: float, child: float) -> str:
        return speed_text(parent / child)

    def kept(parent: float, child: float) -> str:
        return kept_text(child / parent)

    return [
        _FinalRow("parameters", lambda m: m.parameters, count_text, share),
        _FinalRow("memory", lambda m: m.memory_bytes, bytes_text, share),
        _FinalRow("prefill", prefill, ms_text, speed),
        _FinalRow("prefill rate", rate(prompt, prefill), rate_text, times),
        _FinalRow("decode", decode, ms_text, speed),
        _FinalRow("decode rate", rate(steps, decode), rate_text, times),
        _FinalRow("end to end", whole, ms_text, speed),
        _FinalRow("end-to-end rate", rate(batch * scenario.generated_tokens, whole), rate_text, times),
        _FinalRow("KL, nats per token", lambda m: m.evaluation.kl_nats_per_token, number_text, None),
        _FinalRow("perplexity", lambda m: m.evaluation.perplexity, number_text, times),
        _FinalRow("top-1 accuracy", lambda m: m.evaluation.top1_accuracy, percent_text, kept),
        _FinalRow("top-1 agreement", lambda m: m.evaluation.top1_agreement, percent_text, None),
    ]


def _solution_row(inputs: ReportInputs, name: str, solution: FoundArchitecture) -> tuple[str, ...]:
    quality = _quality_cells(inputs, derived.measured(inputs, solution.architecture))
    return (
        name,
        number_text(solution.score),
        *quality,
        percent_text(derived.block_time_share(inputs, solution.prediction)),
    )


def _quality_cells(inputs: ReportInputs, model: ModelResult | None) -> tuple[str, str, str]:
    if model is None:
        return NONE, NONE, NONE
    evaluation, parent_accuracy = model.evaluation, inputs.parent.evaluation.top1_accuracy
    kept = kept_text(evaluation.top1_accuracy / parent_accuracy) if parent_accuracy else NONE
    return number_text(evaluation.kl_nats_per_token), number_text(evaluation.perplexity), kept


def limit_row(use: LimitUse, prices: Sequence[LimitPrice]) -> tuple[str, ...]:
    """One limit: request, threshold, use, slack, and the score gain of a looser limit."""
    usage, slack = "no bound", NONE
    if use.usage is not None:
        room = use.threshold - use.usage if use.sense == "at_most" else use.usage - use.threshold
        usage, slack = (
            _in_unit(use.usage, use.unit),
            f"{_in_unit(room, use.unit)} ({percent_text(room / use.threshold)})",
        )
    price = next((p for p in prices if (p.scenario, p.limit) == (use.scenario, use.name)), None)
    return (
        use.name.replace("_", " "),
        use.scenario,
        use.text,
        f"{'≤' if use.sense == 'at_most' else '≥'} {_in_unit(use.threshold, use.unit)}",
        usage,
        slack,
        _in_unit(price.step, price.unit) if price else NONE,
        range_text(price.at_least, price.at_most) if price else NONE,
    )


def _in_unit(value: float, unit: str) -> str:
    texts = {"tok/s": rate_text, "ms": ms_text, "bytes": bytes_text, "params": count_text}
    if unit in ("layers", "heads") and value == round(value):
        return f"{value:,.0f} {unit}"
    return texts[unit](value) if unit in texts else f"{number_text(value)} {unit}".rstrip()


def _variant_counts(architecture: Architecture) -> tuple[str, str]:
    """Number of layers per attention variant and per FFN variant: `5 × kv4, 3 × no_op`."""

    def counted(variants: list[Variant]) -> str:
        counts = Counter(variants)
        return ", ".join(f"{counts[v]} × {str(v).partition(':')[2]}" for v in sorted(counts, key=variant_order))

    layers = architecture.layers
    return counted([block.attention for block in layers]), counted([block.ffn for block in layers])
