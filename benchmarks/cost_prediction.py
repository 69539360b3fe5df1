"""Accuracy of a cost table for whole models: the table and random architectures, measured end to end.

An architecture has a random block variant of the quickstart's space in every layer. Its predicted time is the sum of
the table's entries for its subblocks and for the parts outside the blocks, as in the search.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

from puzzle_core.architecture import Architecture
from puzzle_core.cost import latency
from puzzle_core.cost.measuring import hardware_name, target_device, timing_of
from puzzle_core.model.child import random_child
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.report.plotting import BLACK, BLUE, ORANGE, label_axes, log_ticks, new_figure, png_bytes
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import ms_text, percent_text
from puzzle_core.spec import RunSpec
from puzzle_core.spec_file import load_spec
from puzzle_core.work import CostRecord, CostWork, Timing, Traffic

PHASES = ("prefill_ms", "decode_ms")
GOAL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, default=Path("deployments/specs/quickstart.yaml"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="write a scatter of measured against predicted times here")
    arguments = parser.parse_args()
    spec = load_spec(arguments.spec)
    parent = Parent(spec.parent)
    traffic = Traffic(
        prompt_tokens=spec.scenario.prompt_tokens,
        generated_tokens=spec.scenario.generated_tokens,
        batch_size=arguments.batch_size,
    )
    drawn = random_architectures(spec, parent, arguments.models, arguments.seed)
    costs, measured = measure(spec, parent, traffic, drawn)
    predicted = {name: predict(costs, architecture) for name, architecture in drawn.items()}
    sys.stdout.write(format_text(errors_table(predicted, measured)) + "\n")
    if arguments.figure:
        arguments.figure.write_bytes(scatter(predicted, measured))


def random_architectures(spec: RunSpec, parent: Parent, count: int, seed: int) -> dict[str, Architecture]:
    """The parent, and architectures with a uniformly drawn block variant in every layer."""
    rng, shape = random.Random(seed), parent.shape
    drawn = [
        Architecture(layers=tuple(rng.choice(spec.variants.blocks_of_layer(n, shape)) for n in range(shape.layers)))
        for _ in range(count)
    ]
    return {"parent": Architecture.of_parent(shape)} | {f"random {n}": child for n, child in enumerate(drawn)}


def measure(
    spec: RunSpec, parent: Parent, traffic: Traffic, architectures: dict[str, Architecture]
) -> tuple[CostRecord, dict[str, Timing]]:
    """The cost table as a run measures it, and whole models; in turns, so that a drift of the machine meets both."""
    spaces = [spec.variants.of_layer(layer, parent.shape) for layer in range(parent.shape.layers)]
    variants = {v for space in spaces for found in space for v in found if not v.is_empty}
    target = spec.target.for_parent(parent.dtype)
    work = CostWork(
        shape=parent.shape.digest(),
        variants=tuple(sorted(variants)),
        traffic=traffic,
        target=target,
        hardware=hardware_name(target),
    )
    device, dtype = target_device(target), torch_dtype(target.served_dtype)
    whole = {name: random_child(parent, child, dtype, device) for name, child in architectures.items()}
    times = latency.time_models(latency.cost_models(work, parent) | whole, traffic, target)
    return latency.cost_record(work, parent, times), {name: timing_of(times[name]) for name in architectures}


def predict(costs: CostRecord, architecture: Architecture) -> Timing:
    """What the table says of a whole model."""
    variants = [variant for block in architecture.layers for variant in block.subblocks if not variant.is_empty]
    return Timing(
        **{p: getattr(costs.outside, p) + sum(getattr(costs.variants[str(v)], p) for v in variants) for p in PHASES}
    )


def errors_table(predicted: dict[str, Timing], measured: dict[str, Timing]) -> Table:
    """Predicted and measured times and their relative differences; below, the median of the absolute ones."""
    errors = {
        phase: {name: getattr(predicted[name], phase) / getattr(timing, phase) - 1 for name, timing in measured.items()}
        for phase in PHASES
    }
    rows = [
        (name, *(cell for p in PHASES for cell in _cells(predicted[name], timing, p, errors[p][name])))
        for name, timing in measured.items()
    ]
    medians = [statistics.median(abs(e) for name, e in errors[p].items() if name != "parent") for p in PHASES]
    rows.append(("median, absolute", "", "", percent_text(medians[0]), "", "", percent_text(medians[1])))
    return Table(
        title=f"Predicted from the cost table against measured end to end (goal: median within {percent_text(GOAL)})",
        columns=("model", "prefill predicted", "measured", "error", "decode predicted", "measured", "error"),
        rows=tuple(rows),
    )


def _cells(predicted: Timing, measured: Timing, phase: str, error: float) -> tuple[str, str, str]:
    return ms_text(getattr(predicted, phase)), ms_text(getattr(measured, phase)), f"{error:+.1%}"


def scatter(predicted: dict[str, Timing], measured: dict[str, Timing]) -> bytes:
    """Measured against predicted milliseconds, prefill and decode side by side; the line is equality."""
    figure = new_figure(7.0, 3.4)
    for axes, phase, colour in zip(figure.subplots(1, 2), PHASES, (BLUE, ORANGE), strict=True):
        x = [getattr(predicted[name], phase) for name in measured]
        y = [getattr(timing, phase) for timing in measured.values()]
        ends = [0.9 * min(x + y), 1.1 * max(x + y)]
        axes.plot(ends, ends, color=BLACK, linewidth=0.8)
        axes.scatter(x, y, color=colour, s=22, zorder=3)
        axes.loglog()
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        label_axes(axes, phase.removesuffix("_ms"), "predicted, ms", "measured, ms")
    return png_bytes(figure)


if __name__ == "__main__":
    main()
