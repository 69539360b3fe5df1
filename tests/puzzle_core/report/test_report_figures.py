"""Figures: the artists that belong there, with labels and units."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from puzzle_core.report import figures
from puzzle_core.report.curves import bld_figure, gkd_figure
from puzzle_core.report.plotting import png_bytes, smoothed
from puzzle_core.report.report_inputs import ReportInputs

Make = Callable[..., ReportInputs]


def legend_of(figure: Figure) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_one_bar_per_layer_and_part(inputs: ReportInputs) -> None:
    figure = figures.architecture_figure(inputs)
    (axes,) = figure.axes
    assert len(axes.patches) == 4 * 8
    assert axes.get_xlabel() == "prefill + decode, predicted (ms)"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[4].split() == ["4", "attn:no_op", "ffn:linear"]
    assert {"attention, kept", "attention, saved", "FFN, kept", "FFN, saved"} <= legend_of(figure)


def test_bars_reach_the_parents_time(inputs: ReportInputs) -> None:
    (axes,) = figures.architecture_figure(inputs).axes
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(4, 8)
    np.testing.assert_allclose(widths.sum(0), 83.0)
    assert widths[2:, 0].sum() == 0


def test_quality_against_speed(inputs: ReportInputs) -> None:
    figure = figures.quality_figure(inputs)
    left, right = figure.axes
    assert len(left.collections) == 4 + 2
    assert len(right.collections) == 4 + 3
    assert len(left.lines[0].get_xdata()) == len(inputs.search.frontier)
    assert legend_of(figure) >= {"parent", "child, after assembly", "child, after GKD", "greedy", "maximise parameters"}
    assert left.get_ylabel() == "sum of scores (KL, nats per token)"
    star = right.collections[-1].get_offsets()
    np.testing.assert_allclose(
        star, [[inputs.search.best.prediction.total_ms, inputs.child.evaluation.kl_nats_per_token]]
    )


def test_predicted_against_measured(inputs: ReportInputs) -> None:
    times, quality = figures.predicted_figure(inputs).axes
    assert len(times.collections) == 2 * 4 + 1
    assert len(quality.collections) == 1 + 4
    line = times.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    other = inputs.model_copy(update={"search": inputs.search.model_copy(update={"objective": "disagreement"})})
    assert len(figures.predicted_figure(other).axes) == 1


def test_heat_map_has_every_score(inputs: ReportInputs) -> None:
    axes = figures.scores_figure(inputs).axes[0]
    image = axes.images[0].get_array()
    assert image is not None
    assert image.shape == (8, 29)
    changed = sum(block != inputs.shape.largest_block for block in inputs.child.architecture.layers)
    assert len(np.asarray(axes.collections[0].get_offsets())) == changed
    assert axes.get_xticklabels()[0].get_text() == "attn:kv4+ffn:i768"


def test_a_panel_per_variant_and_a_line_per_layer(inputs: ReportInputs) -> None:
    panels = [axes for axes in bld_figure(inputs.bld).axes if axes.lines]
    assert [axes.get_title(loc="left") for axes in panels][:2] == ["attn:kv2", "attn:kv1"]
    assert [len(axes.lines) for axes in panels] == [8] * 7
    assert {axes.get_yscale() for axes in panels} == {"log"}


def test_gkd_terms(inputs: ReportInputs) -> None:
    assert inputs.gkd
    figure = gkd_figure(inputs.trainings)
    assert len(figure.axes[0].lines) == 2 * 3 + 1
    assert legend_of(figure) == {
        "loss, all terms",
        "1 - cosine of hidden states, summed over layers",
        "KL to the parent",
        "KL on held-back windows, without a weight",
    }
    points = figure.axes[0].lines[-1].get_xydata()
    assert points[:, 0].tolist() == [4096 * point.step for point in inputs.gkd.held_back]
    assert points[:, 1].tolist() == [point.kl_nats_per_token for point in inputs.gkd.held_back]
    assert figure.axes[0].get_xlim()[1] >= inputs.gkd.tokens * 0.98


def test_a_second_gkd_is_drawn_after_the_first_one_in_its_colours(inputs: ReportInputs) -> None:
    assert inputs.gkd
    once, twice = (gkd_figure([inputs.gkd] * times) for times in (1, 2))
    assert legend_of(twice) == legend_of(once)
    assert len(twice.axes[0].lines) == 2 * len(once.axes[0].lines) + 1
    first, second = (figure.axes[0].lines[-1].get_xydata() for figure in (once, twice))
    assert (second[:, 0] - first[:, 0]).tolist() == [inputs.gkd.tokens] * len(first)


def test_smoothing_keeps_the_mean() -> None:
    steps, means = smoothed([float(x) for x in range(100)])
    np.testing.assert_allclose(means, steps - 1)
    assert list(smoothed([3.0])[1]) == [3.0]
    assert len(smoothed([1.0] * 100_000)[1]) <= 500


def test_only_what_there_is(make_inputs: Make) -> None:
    inputs = make_inputs(layers=1, gkd=False).model_copy(update={"bld": ()})
    drawn = figures.all_figures(inputs)
    assert set(drawn) == {"architecture", "quality_against_speed", "predicted_against_measured", "scores"}


@pytest.mark.parametrize("zeros", [True, False])
def test_draws_where_everything_is_the_parent(make_inputs: Make, zeros: bool) -> None:
    inputs = make_inputs(layers=2, gkd=False)
    parent = inputs.search.best.model_copy(
        update={"architecture": inputs.parent.architecture, "score": 0.0, "prediction": inputs.search.parent}
    )
    update = {"solutions": (parent,)} | ({"baselines": (), "frontier": ()} if zeros else {})
    child = inputs.parent.model_copy(update={"name": "child after assembly", "kind": "child", "timing": None})
    inputs = inputs.model_copy(
        update={"search": inputs.search.model_copy(update=update), "models": (inputs.parent, child)}
    )
    for figure in (figures.quality_figure(inputs), figures.predicted_figure(inputs)):
        assert png_bytes(figure).startswith(b"\x89PNG")
