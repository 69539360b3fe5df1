"""Figures of the trainings: loss curves of blockwise local distillation and of global knowledge distillation."""

import math
from collections import defaultdict
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from puzzle_core.architecture import Option, Variant
from puzzle_core.report.plotting import (
    BLACK,
    BLUE,
    GREEN,
    LAYER_COLOURS,
    ORANGE,
    PURPLE,
    VERMILLION,
    label_axes,
    log_ticks,
    new_figure,
    smoothed,
)
from puzzle_core.report.report_tables import variant_order
from puzzle_core.work import BldRecord, GkdRecord

TERMS = {
    "loss": ("loss, all terms", BLACK),
    "cosine": ("1 - cosine of hidden states, summed over layers", BLUE),
    "kl": ("KL to the parent", ORANGE),
    "lm": ("next-token loss", GREEN),
}


def bld_figure(records: tuple[BldRecord, ...]) -> Figure:
    """One panel per variant, one smoothed line per layer, losses on a logarithmic scale."""
    by_variant: dict[Variant | Option, list[BldRecord]] = defaultdict(list)
    for record in records:
        by_variant[record.variant].append(record)
    columns = min(4, len(by_variant))
    rows = math.ceil(len(by_variant) / columns)
    figure = new_figure(1.6 + 2.5 * columns, 0.8 + 2.1 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    layers = sorted({record.layer for record in records})
    norm = Normalize(layers[0], layers[-1])
    for axes, variant in zip(panels, sorted(by_variant, key=variant_order), strict=False):
        for record in sorted(by_variant[variant], key=lambda record: record.layer):
            _draw_curve(axes, record.curve, record.tokens, colormaps[LAYER_COLOURS](norm(record.layer)))
        label_axes(axes, str(variant), "", "")
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    for axes in panels[len(by_variant) :]:
        axes.set_visible(False)
    for axes in panels[len(by_variant) - columns : len(by_variant)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("normalised squared error (0 is perfect)", fontsize=9)
    if len(layers) == 1:
        return figure
    colours, whole = ScalarMappable(norm, LAYER_COLOURS), MaxNLocator(integer=True)
    bar = figure.colorbar(colours, ax=list(panels), pad=0.02, ticks=whole)
    bar.set_label("layer", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def gkd_figure(records: Sequence[GkdRecord]) -> Figure:
    """The loss and its terms, faint as they were and strong when smoothed; KL on held-back windows as points.

    Trainings of the same child follow one another on the axis of tokens.
    """
    figure = new_figure(8.5, 4.2)
    axes = figure.add_subplot()
    begin = 0
    for record in records:
        if begin:
            axes.axvline(begin, color=BLACK, linewidth=0.8, linestyle=":")
        _draw_training(axes, record, begin)
        begin += record.tokens
    kls = [point.kl_nats_per_token for record in records for point in record.held_back]
    if all(value > 0 for value in [*kls, *(v for record in records for terms in record.curve for v in terms.values())]):
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    label_axes(axes, "Global knowledge distillation", "tokens", "weighted loss")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_training(axes: Axes, record: GkdRecord, begin: int) -> None:
    """One training, which starts at token `begin`; only the first one has labels."""
    for name in record.curve[0]:
        label, colour = TERMS.get(name, (name, PURPLE))
        values = [terms[name] for terms in record.curve]
        tokens = [begin + record.tokens * (step + 1) / len(values) for step in range(len(values))]
        axes.plot(tokens, values, color=colour, alpha=0.22, linewidth=0.8)
        _draw_curve(axes, values, record.tokens, colour, "" if begin else label, begin)
    if record.held_back:
        tokens = [begin + record.tokens * point.step / len(record.curve) for point in record.held_back]
        kls = [point.kl_nats_per_token for point in record.held_back]
        label = "" if begin else "KL on held-back windows, without a weight"
        axes.plot(tokens, kls, color=VERMILLION, linestyle="none", marker="o", markersize=4, label=label)


def _draw_curve(
    axes: Axes,
    curve: Sequence[float],
    tokens: int,
    colour: str | tuple[float, ...],
    label: str = "",
    begin: int = 0,
) -> None:
    steps, means = smoothed(curve)
    marker, places = "" if len(means) > 2 else ".", begin + steps * (tokens / len(curve))
    axes.plot(places, means, color=colour, linewidth=1.2, marker=marker, label=label or None)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
