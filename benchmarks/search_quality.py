"""The searched child of a finished run and the children of simpler search methods (issue 2, section 10.2).

All were chosen from the same scores and costs under the same limits, assembled from the same library and evaluated on
the same held-out text; none is distilled, so the choice alone makes the difference. The predicted times show the slack
of each method. Below: the child as delivered, after GKD, beside its parent.
"""

import argparse
import sys
from pathlib import Path

from puzzle_core.report import derived
from puzzle_core.report.report import INPUTS
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import NONE, ms_text, number_text, percent_text, times_text
from puzzle_core.search.search_record import FoundArchitecture
from puzzle_core.work import Timing

KEPT_GOAL, SPEED_GOAL = 0.97, 1.4


def choices_table(inputs: ReportInputs) -> Table:
    """MIP and baselines, one row each."""
    chosen = derived.measured(inputs, inputs.search.best.architecture)
    assert chosen, "a report holds the assembled child"
    rows = [_row(inputs, found, chosen.evaluation.kl_nats_per_token) for found in found_of(inputs)]
    parent = inputs.parent
    own = [
        "parent",
        "0",
        "0",
        NONE,
        number_text(parent.evaluation.perplexity),
        percent_text(1.0),
        *_times(inputs.search.parent, parent.timing),
    ]
    return Table(
        title=f"Ways to choose: {inputs.spec.name}, {inputs.spec.scenario.name}, batch size {inputs.batch_size}",
        columns=(
            "method",
            "score predicted",
            "KL measured",
            "KL to MIP's",
            "perplexity",
            "top-1 kept",
            "prefill predicted",
            "measured",
            "decode predicted",
            "measured",
        ),
        rows=(tuple(own), *rows),
    )


def found_of(inputs: ReportInputs) -> list[FoundArchitecture]:
    """What the search chose, then the baselines."""
    return [inputs.search.best, *inputs.search.baselines]


def kl_ratios(inputs: ReportInputs) -> dict[str, float]:
    """Measured KL of each baseline over that of the searched child, both undistilled; missing where not evaluated."""
    models = {derived.method_name(found): derived.measured(inputs, found.architecture) for found in found_of(inputs)}
    kl = {name: model.evaluation.kl_nats_per_token for name, model in models.items() if model}
    own = kl.pop("MIP")
    return {name: value / own if own else float("inf") for name, value in kl.items()}


def goals_table(inputs: ReportInputs) -> Table:
    """The issue's goals and what was reached."""
    numbers, ratios = derived.headline(inputs), kl_ratios(inputs)
    rows = [("top-1 accuracy kept", percent_text(KEPT_GOAL), percent_text(numbers["top1_kept"]))]
    for phase in ("prefill", "decode", "end_to_end"):
        reached = numbers.get(f"speedup_{phase}")
        name = f"{phase.replace('_', ' ')}, times as fast as the parent"
        rows.append((name, times_text(SPEED_GOAL), times_text(reached) if reached else NONE))
    worst = min(ratios, key=lambda name: ratios[name]) if ratios else NONE
    rows.append((f"KL of the best baseline ({worst}) to MIP's", "> 1.00x", times_text(min(ratios.values(), default=0))))
    return Table(title=f"The {inputs.child.name}", columns=("", "at least", "reached"), rows=tuple(rows))


def _row(inputs: ReportInputs, found: FoundArchitecture, mip_kl: float) -> tuple[str, ...]:
    model, own = derived.measured(inputs, found.architecture), inputs.parent.evaluation.top1_accuracy
    name, score = derived.method_name(found), number_text(found.score)
    if model is None:
        return (name, score, NONE, NONE, NONE, NONE, *_times(found.prediction, None))
    quality = model.evaluation
    return (
        name,
        score,
        number_text(quality.kl_nats_per_token),
        times_text(quality.kl_nats_per_token / mip_kl) if mip_kl else NONE,
        number_text(quality.perplexity),
        percent_text(quality.top1_accuracy / own) if own else NONE,
        *_times(found.prediction, model.timing),
    )


def _times(predicted: object, measured: Timing | None) -> tuple[str, ...]:
    return tuple(
        ms_text(getattr(times, phase)) if times else NONE
        for phase in ("prefill_ms", "decode_ms")
        for times in (predicted, measured)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="where `puzzle run` put its report")
    inputs = ReportInputs.read(parser.parse_args().report / INPUTS)
    sys.stdout.write(f"{format_text(choices_table(inputs))}\n\n{format_text(goals_table(inputs))}\n")


if __name__ == "__main__":
    main()
