"""Two children of one library on one frontier. The second needs only a search and its own training.

Give the report directories of two or more runs that differ in their limits alone. The figure shows the best score that
the library allows at every time (the frontier of the first run), where each child stands on it, and the measured KL of
each before and after GKD; the table lists the artifacts that each run added.
"""

import argparse
import sys
from pathlib import Path

from puzzle_core.report import derived
from puzzle_core.report.plotting import BLUE, GREY, VERMILLION, label_axes, new_figure, png_bytes
from puzzle_core.report.report import INPUTS
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import number_text, percent_text, times_text


def table(runs: list[ReportInputs]) -> Table:
    """One row per child."""
    rows = []
    for inputs in runs:
        numbers, before = derived.headline(inputs), inputs.children[0].evaluation.kl_nats_per_token
        rows.append(
            (
                inputs.spec.name,
                ", ".join(f"{name} {text}" for name, text in inputs.spec.scenario.limits.by_name().items()),
                str(len(set(inputs.bld) - set(runs[0].bld))),
                str(len(set(inputs.scores) - set(runs[0].scores))),
                percent_text(numbers["parameters_ratio"]),
                times_text(numbers.get("speedup_end_to_end", float("nan"))),
                number_text(inputs.search.best.score),
                number_text(before),
                number_text(numbers["kl_nats_per_token"]),
                percent_text(numbers["top1_kept"]),
            )
        )
    return Table(
        title="Children of one library",
        columns=(
            "run",
            "limits",
            "new variants",
            "new scores",
            "parameters",
            "end to end",
            "score",
            "KL assembled",
            "KL after GKD",
            "top-1 kept",
        ),
        rows=tuple(rows),
        text_columns=2,
    )


def figure(runs: list[ReportInputs]) -> bytes:
    """Frontier and children as a PNG."""
    drawn = new_figure(6.4, 4.4)
    axes = drawn.add_subplot()
    points = sorted((found.prediction.total_ms, found.score) for found in runs[0].search.frontier)
    axes.plot(*zip(*points, strict=True), color=GREY, marker=".", label="frontier: sum of scores")
    for inputs in runs:
        chosen, (before, *_, after) = inputs.search.best, inputs.children
        x = chosen.prediction.total_ms
        axes.scatter([x], [chosen.score], marker="*", s=140, color=VERMILLION, zorder=3)
        axes.annotate(inputs.spec.name, (x, chosen.score), textcoords="offset points", xytext=(6, 6), fontsize=8)
        axes.plot(
            [x, x],
            [before.evaluation.kl_nats_per_token, after.evaluation.kl_nats_per_token],
            color=BLUE,
            marker="v",
            linewidth=1,
        )
    axes.scatter([], [], marker="*", color=VERMILLION, label="child: sum of scores")
    axes.plot([], [], color=BLUE, marker="v", label="child: KL measured, assembled to after GKD")
    axes.set_yscale("symlog", linthresh=0.05)
    label_axes(axes, "", "prefill + decode, predicted (ms)", "nats per token")
    axes.legend(fontsize=8, frameon=False)
    return png_bytes(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="DIR", help="where `puzzle run` put its reports")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    runs = [ReportInputs.read(directory / INPUTS) for directory in options.reports]
    sys.stdout.write(f"{format_text(table(runs))}\n")
    if options.figure:
        options.figure.write_bytes(figure(runs))


if __name__ == "__main__":
    main()
