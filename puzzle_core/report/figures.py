"""Figures of the search: the architecture, quality against speed, predictions against measurements, scores."""

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from puzzle_core.architecture import Option
from puzzle_core.report import derived
from puzzle_core.report.curves import bld_figure, gkd_figure
from puzzle_core.report.plotting import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    label_axes,
    log_scale_to_zero,
    log_ticks,
    new_figure,
)
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import OBJECTIVE_UNITS, variant_order
from puzzle_core.report.report_warnings import TIME_ERROR
from puzzle_core.report.units import time_scale
from puzzle_core.search.search_record import FoundArchitecture

SPEED_TICKS = (1, 1.25, 1.5, 2, 3, 5, 10)
MODEL_STYLES = (("o", GREY), ("o", BLACK), ("s", BLUE), ("D", ORANGE), ("^", PURPLE), ("v", GREEN), ("P", SKY))
BASELINE_STYLES = (("s", ORANGE), ("^", PURPLE), ("v", GREEN), ("D", SKY), ("P", GREY), ("X", BLACK))


def all_figures(inputs: ReportInputs) -> dict[str, Figure]:
    """Every figure that this run has data for, by file name without suffix."""
    figures = {
        "architecture": architecture_figure(inputs),
        "quality_against_speed": quality_figure(inputs),
    }
    if derived.comparisons(inputs):
        figures["predicted_against_measured"] = predicted_figure(inputs)
    if inputs.scores:
        figures["scores"] = scores_figure(inputs)
    if inputs.bld:
        figures["bld"] = bld_figure(inputs.bld)
    if inputs.trainings:
        figures["gkd"] = gkd_figure(inputs.trainings)
    return figures


def architecture_figure(inputs: ReportInputs) -> Figure:
    """One bar per layer: time kept and saved in attention and FFN, labelled with the layer's variants."""
    layers = derived.layer_facts(inputs)
    figure = new_figure(8.5, 1.7 + 0.24 * len(layers))
    axes = figure.add_subplot()
    largest_ms = max(fact.parent_ms for fact in layers)
    scale, unit = time_scale(largest_ms)
    parts = (
        ("attention, kept", [fact.attention_ms for fact in layers], BLUE, ""),
        ("FFN, kept", [fact.ffn_ms for fact in layers], ORANGE, ""),
        ("attention, saved", [max(0, f.parent_attention_ms - f.attention_ms) for f in layers], "#D3E6F3", "////"),
        ("FFN, saved", [max(0, f.parent_ffn_ms - f.ffn_ms) for f in layers], "#FBE7C0", "////"),
    )
    rows, left = np.arange(len(layers)), np.zeros(len(layers))
    for name, times_ms, colour, hatch in parts:
        width = np.array(times_ms) / scale
        axes.barh(rows, width, 0.78, left, label=name, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        left += width
    label = "parent's largest layer" if inputs.shape.blocks else "parent's layer"
    axes.axvline(largest_ms / scale, color=BLACK, linewidth=1, linestyle="--", label=label)
    label_axes(axes, "What each layer became", f"prefill + decode, predicted ({unit})", "")
    axes.grid(False, axis="y")
    cells = [("layer", "attention", "FFN"), *((str(f.layer), str(f.block.attention), str(f.block.ffn)) for f in layers)]
    header, *names = [f"{layer:>5}  {attention:<11}  {ffn:<10}" for layer, attention, ffn in cells]
    axes.set_yticks(rows, names, family="monospace", fontsize=8)
    axes.annotate(header, (0, 1), (-7, 5), "axes fraction", "offset points", ha="right", family="monospace", fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(0, 1.04 * max(left.max(), largest_ms / scale))
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def quality_figure(inputs: ReportInputs) -> Figure:
    """Predicted score and measured KL, both against predicted time: frontier, parent, child and baselines."""
    figure = new_figure(10.5, 4.8)
    left, right = figure.subplots(1, 2, sharex=True)
    search = inputs.search
    scale, unit = time_scale(search.parent.total_ms)
    _draw_predicted(left, inputs, scale)
    _draw_measured(right, inputs, scale)
    x = f"prefill + decode, predicted ({unit})"
    label_axes(left, "Predicted", x, f"sum of scores ({OBJECTIVE_UNITS[search.objective]})")
    label_axes(right, "Measured on assembled models", x, "KL to the parent (nats per token)")
    architectures = (search.best, *search.baselines, *search.frontier)
    log_scale_to_zero(left, [f.score for f in architectures])
    log_scale_to_zero(right, [model.evaluation.kl_nats_per_token for model in inputs.models])
    times_ms = [f.prediction.total_ms for f in architectures if f.prediction.total_ms > 0]
    least_ms = min(times_ms, default=search.parent.total_ms)
    for axes in (left, right):
        _add_speed_axis(axes, search.parent.total_ms / scale, least_ms / scale)
    names = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    names |= dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def predicted_figure(inputs: ReportInputs) -> Figure:
    """Predicted against measured: times of whole models, and the sum of scores if it is a KL."""
    alike = inputs.search.objective == "kl" and not inputs.rounds  # scores of a later round are KL to its own parent
    with_scores = alike and _score_points(inputs)
    figure = new_figure(10.5 if with_scores else 5.8, 6.4)
    panels = figure.subplots(1, 2 if with_scores else 1, squeeze=False)[0]
    _draw_times(panels[0], inputs)
    _legend(figure, panels[0], "outside lower left")
    if with_scores:
        _draw_scores(panels[1], inputs)
        _legend(figure, panels[1], "outside lower right")
    return figure


def scores_figure(inputs: ReportInputs) -> Figure:
    """KL of every scored block variant in every layer, with marks on the child's blocks."""
    kl = {(score.layer, score.option): score.kl_nats_per_token for score in inputs.scores}
    blocks = sorted({block for _, block in kl}, key=variant_order)
    layers = range(inputs.shape.layers)
    table_LJ = np.array([[kl.get((layer, block), np.nan) for block in blocks] for layer in layers])
    figure = new_figure(3.2 + 0.2 * max(len(blocks), 12), 2.9 + 0.19 * max(len(layers), 5))
    axes = figure.add_subplot()
    positive = table_LJ[table_LJ > 0]
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if positive.size else None
    image = axes.imshow(np.where(table_LJ > 0, table_LJ, np.nan), aspect="auto", cmap="viridis", norm=norm)
    axes.set_facecolor("#E0E0E0")
    taken = [(blocks.index(b), layer) for layer in layers for b in _scored_blocks(inputs, layer) if b in blocks]
    if taken:
        columns, rows = zip(*taken, strict=True)
        axes.scatter(
            columns,
            rows,
            marker="o",
            s=22,
            c="white",
            edgecolors=BLACK,
            label="in the child; no mark: the parent's own block",
        )
    label_axes(axes, "Replace-1-block scores (grey: 0 or not scored)", "", "layer")
    axes.grid(False)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks], rotation=90, family="monospace", fontsize=7)
    axes.set_yticks([layer for layer in layers if layer % (1 + len(layers) // 40) == 0])
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=max(15, 1.3 * len(layers)))
    bar.set_label("KL (nats per token)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if positive.size:
        log_ticks(bar.ax.yaxis)
    if taken:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    return figure


def _add_speed_axis(axes: Axes, parent_time: float, least_time: float) -> None:
    """Add a top axis with the speed as a multiple of the parent's."""
    longest = max(axes.get_xlim())
    axes.set_xlim(0, max(longest, 1.08 * parent_time))

    def reciprocal(value: ArrayLike) -> NDArray[np.float64]:
        return parent_time / np.maximum(np.asarray(value, dtype=np.float64), 1e-9 * parent_time)

    top = axes.secondary_xaxis("top", functions=(reciprocal, reciprocal))
    top.set_xticks([speed for speed in SPEED_TICKS if speed <= 1.1 * parent_time / least_time])
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    top.xaxis.set_minor_locator(NullLocator())
    top.tick_params(labelsize=8)
    top.set_xlabel("as fast as the parent", fontsize=8)


def _draw_predicted(axes: Axes, inputs: ReportInputs, scale: float) -> None:
    search = inputs.search
    if search.frontier:
        points = sorted((solution.prediction.total_ms / scale, solution.score) for solution in search.frontier)
        axes.plot(
            *zip(*points, strict=True),
            color=BLUE,
            marker=".",
            linewidth=1.2,
            label="frontier: the best score at each time",
        )
    for (marker, colour), solution in zip(_styles(search.baselines), search.baselines, strict=True):
        _mark(axes, solution.prediction.total_ms / scale, solution.score, marker, colour, derived.method_name(solution))
    if not inputs.rounds:
        _mark(axes, search.parent.total_ms / scale, 0, "o", BLACK, "parent")
    chosen = search.best
    _mark(axes, chosen.prediction.total_ms / scale, chosen.score, "*", VERMILLION, "child, after assembly")


def _draw_measured(axes: Axes, inputs: ReportInputs, scale: float) -> None:
    search = inputs.search
    for (marker, colour), solution in zip(_styles(search.baselines), search.baselines, strict=True):
        model = derived.measured(inputs, solution.architecture)
        if model:
            kl = model.evaluation.kl_nats_per_token
            _mark(axes, solution.prediction.total_ms / scale, kl, marker, colour, derived.method_name(solution))
    _mark(axes, search.parent.total_ms / scale, inputs.parent.evaluation.kl_nats_per_token, "o", BLACK, "parent")
    x, kls = search.best.prediction.total_ms / scale, [c.evaluation.kl_nats_per_token for c in inputs.children]
    _mark(axes, x, kls[0], "*", VERMILLION, "child, after assembly")
    if len(kls) > 1:
        axes.annotate("", (x, kls[-1]), (x, kls[0]), arrowprops={"arrowstyle": "->", "color": VERMILLION})
        _mark(axes, x, kls[-1], "*", "white", "child, after GKD", edge=VERMILLION)


def _mark(axes: Axes, x: float, y: float, marker: str, colour: str, label: str, edge: str = "white") -> None:
    size = 190 if marker == "*" else 60
    axes.scatter([x], [y], s=size, marker=marker, c=colour, edgecolors=edge, linewidths=1, label=label, zorder=3)


def _styles(baselines: tuple[FoundArchitecture, ...]) -> list[tuple[str, str]]:
    return [BASELINE_STYLES[index % len(BASELINE_STYLES)] for index in range(len(baselines))]


def _draw_times(axes: Axes, inputs: ReportInputs) -> None:
    """Draw nested markers, because points of equal architectures coincide. Hollow is prefill, filled is decode."""
    comparisons = derived.comparisons(inputs)
    scale, unit = time_scale(max((c.measured_ms for c in comparisons), default=1.0))
    models = list(dict.fromkeys(c.model for c in comparisons))
    for c in comparisons:
        index = models.index(c.model)
        marker, colour = MODEL_STYLES[index % len(MODEL_STYLES)]
        axes.scatter(
            [c.measured_ms / scale],
            [c.predicted_ms / scale],
            s=max(20, 170 - 45 * index),
            marker=marker,
            facecolors=colour if c.phase == "decode" else "none",
            edgecolors=colour if c.phase == "prefill" else "white",
            label=f"{c.phase} of {c.model}",
            zorder=3 + index,
        )
    ends = _identity(axes, [t / scale for c in comparisons for t in (c.predicted_ms, c.measured_ms)])
    axes.fill_between(
        ends, [(1 - TIME_ERROR) * end for end in ends], [(1 + TIME_ERROR) * end for end in ends],
        color="#EDEDED", linewidth=0, label=f"within {TIME_ERROR:.0%}", zorder=0,
    )  # fmt: skip
    label_axes(axes, "Times", f"measured ({unit})", f"predicted ({unit})")


def _score_points(inputs: ReportInputs) -> list[tuple[str, float, float]]:
    """Names, measured KL and predicted score of the assembled models."""
    search = inputs.search
    named = [("MIP (chosen)", search.best), *((derived.method_name(f), f) for f in search.baselines)]
    pairs = [(name, solution, derived.measured(inputs, solution.architecture)) for name, solution in named]
    points = [(name, m.evaluation.kl_nats_per_token, solution.score) for name, solution, m in pairs if m]
    return [point for point in points if point[1] > 0 and point[2] > 0]


def _draw_scores(axes: Axes, inputs: ReportInputs) -> None:
    points = _score_points(inputs)
    for (marker, colour), (name, kl, score) in zip((("*", VERMILLION), *BASELINE_STYLES), points, strict=False):
        _mark(axes, kl, score, marker, colour, name)
    _identity(axes, [value for _, *pair in points for value in pair])
    label_axes(axes, "Quality", "KL measured (nats per token)", "sum of scores (nats per token)")


def _legend(figure: Figure, axes: Axes, place: Literal["outside lower left", "outside lower right"]) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc=place, ncols=2, fontsize=8, markerscale=0.8, frameon=False)


def _identity(axes: Axes, values: list[float]) -> list[float]:
    """Set equal logarithmic axes over the positive values and draw the identity line; returns its ends."""
    ends = [0.6 * min(values, default=1.0), 1.7 * max(values, default=1.0)]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="equal")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, box_aspect=1)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    return ends


def _scored_blocks(inputs: ReportInputs, layer: int) -> list[Option]:
    """The scored options of the child's layer: the block itself, or one block per scored subblock."""
    option, parent = inputs.chosen.architecture.options.get(layer), inputs.scored_shape.parent_block(layer)
    if option is None:
        return []
    if inputs.spec.scoring.composition == "pairs" or option.span > 1:
        return [option]
    return [Option(parent.with_variant(variant)) for variant in option.block.subblocks]
