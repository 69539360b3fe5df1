"""What all figures share: colours that colour-blind readers tell apart, axes, log scales that reach zero, PNG bytes.

Figures are made and drawn without pyplot, so nothing is kept between them and any thread may draw.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#222222", "#8A8A8A"
LAYER_COLOURS = "viridis"
DOTS_PER_INCH = 140


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that lays itself out."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, axis labels and a quiet grid."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def log_scale_to_zero(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis that still shows zero: linear below the smallest positive value."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    threshold = 10.0 ** np.floor(np.log10(min(positive)))
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    least = min(values)
    axes.set_ylim(-0.25 * threshold if least >= 0 else 2 * least, 2 * max(positive))


def smoothed(curve: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and running means over a twentieth of the curve, thinned to some hundred points."""
    window = max(1, len(curve) // 20)
    sums = np.cumsum([0.0, *curve])
    means = (sums[window:] - sums[:-window]) / window
    kept = slice(None, None, max(1, len(means) // 400))
    return (np.arange(len(means)) + (window + 1) / 2)[kept], means[kept]


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
