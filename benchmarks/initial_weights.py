"""Ways to start the variants of a parent: which has the least loss before training, and what that gives after it.

    python -m benchmarks.initial_weights SPEC --tokens 65536

Every reduced attention and FFN of the specification is trained from its default weights and from the best of all ways
(`bld.initial_weights: best`), on the same tokens in the same order. Losses are those on held-back windows, means over
layers; `wins` counts the layers in which a way had the least loss before training.
"""

import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal

import torch

from benchmarks.planned import bld_options, captured, packed, placed_spec, planned
from puzzle_core.architecture import Variant
from puzzle_core.device import available_cores
from puzzle_core.distill import bld
from puzzle_core.distill.importance import measure_contributions
from puzzle_core.model.activations import Activations
from puzzle_core.plan import Plan
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.work import BldRecord


def trained(
    plan: Plan, activations: Activations, contributions: Path, variant: Variant, way: Literal["default", "best"]
) -> list[BldRecord]:
    """The training of a variant in every layer, from one way to start or from the best of all."""
    records = []
    for layer in plan.layers:
        work = plan.bld(layer, variant)
        spec = work.spec.model_copy(update={"initial_weights": way})
        with tempfile.TemporaryDirectory() as out:
            asked = work.model_copy(update={"spec": spec})
            records.append(bld.train_variant(asked, activations, contributions, Path(out)))
    return records


def row_of(variant: Variant, plain: list[BldRecord], best: list[BldRecord]) -> tuple[str, ...]:
    """A variant's losses before and after training, and how often each way was the best one."""

    def mean(records: list[BldRecord], name: str) -> str:
        return f"{statistics.mean(getattr(record, name) for record in records):.4f}"

    taken = Counter(min(record.compared, key=record.compared.__getitem__) for record in best)
    wins = ", ".join(f"{way} {taken[way]}" for way in best[0].compared)
    losses = (mean(records, name) for name in ("initial_loss", "final_loss") for records in (plain, best))
    return str(variant), wins, *losses


def main() -> None:
    options = bld_options(__doc__).parse_args()
    torch.set_num_threads(available_cores())
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        spec = placed_spec(options, place)
        plan, context = planned(spec)
        contributions = place / "contributions"
        contributions.mkdir()
        calibration = packed(plan, context, "calibration")
        measure_contributions(plan.importance(), context.open_parent(), calibration, contributions)
        activations = captured(plan, context, "bld", plan.spec.bld.dtype, place / "states")
        asked = [v for v in plan.trained(0) if v.row.other_weights and not v.window]
        rows = [
            row_of(v, *(trained(plan, activations, contributions, v, way) for way in ("default", "best")))
            for v in asked
        ]
    title = f"Starts of reduced variants of {spec.parent.path}, {options.tokens:,} tokens each, means over layers"
    columns = ("variant", "wins", "before: default", "before: best", "after: default", "after: best")
    sys.stdout.write(f"{format_text(Table(title, columns, tuple(rows), text_columns=2))}\n")


if __name__ == "__main__":
    main()
