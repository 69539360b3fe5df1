"""The whole method on real parents that this project did not train, as one Markdown table for docs/results.md.

For each Hugging Face directory: a spec made from the quickstart's (same search space, limits and budgets) with the
parent's own KV heads, windows of its whole context, and a scenario that fills it half with prompt and half with
generation; `puzzle run` on it in a process of its own, with a store of its own; then the figures of its report.
Speed-ups are measured end to end on whole models. Perplexities of different tokenizers do not compare, bits per byte
do. KL of other choices: each baseline's over the searched child's, none of them distilled.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmarks.puzzle_run import REPOSITORY, last_report, manifests, open_store, run_puzzle
from benchmarks.search_quality import kl_ratios
from puzzle_core.architecture import Architecture
from puzzle_core.errors import PuzzleError
from puzzle_core.report import derived
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import format_text, shortlist_table
from puzzle_core.report.units import count_text, duration_text, number_text, percent_text, times_text

DATA = REPOSITORY.parent / "shared/data"
QUICKSTART = REPOSITORY / "deployments/specs/quickstart.yaml"
COLUMNS = (
    "parent",
    "child's parameters",
    "prefill",
    "decode",
    "end to end",
    "top-1 kept",
    "perplexity, parent → child",
    "bits per byte, parent → child",
    "KL, nats per token",
    "KL of other choices to MIP's",
    "time of the run",
)


def make_spec(parent: Path, train: Path, held_out: Path) -> dict[str, Any]:
    """A spec for this parent as plain values."""
    config = json.loads((parent / "config.json").read_text())
    context, kv_heads = config["max_position_embeddings"], config["num_key_value_heads"]
    quickstart = yaml.safe_load(QUICKSTART.read_text())
    return quickstart | {
        "name": parent.name,
        "parent": {"path": str(parent.resolve())},
        "data": {
            "train_texts": [str(train.resolve())],
            "held_out_texts": [str(held_out.resolve())],
            "sequence_length": context,
        },
        "variants": quickstart["variants"] | {"kv_heads": [n for n in range(kv_heads, 0, -1) if kv_heads % n == 0]},
        "scenario": quickstart["scenario"] | {"prompt_tokens": context // 2, "generated_tokens": context // 2},
    }


def measure(parent: Path, options: argparse.Namespace, place: Path) -> tuple[str, str]:
    """Run one parent; its row of the table, and its child's layers and shortlist as text."""
    place.mkdir(parents=True, exist_ok=True)
    spec = place / f"{parent.name}.yaml"
    spec.write_text(yaml.safe_dump(make_spec(parent, options.train, options.held_out), sort_keys=False))
    seconds = run_puzzle(spec, options.overrides, place)
    store = open_store(place)
    inputs = last_report(store)
    tokens = [found.record for found in manifests(store, "tokens") if found.work["split"] == "evaluation"][-1]
    layers = "; ".join(f"{count} × {block}" for block, count in blocks(inputs.child.architecture))
    line = f"- {parent.name}: {layers}"
    if (shortlist := shortlist_table(inputs)).rows:
        line += f"\n\n{format_text(shortlist)}\n"
    return row(parent.name, inputs, tokens["bytes_per_token"], seconds), line


def row(name: str, inputs: ReportInputs, bytes_per_token: float, seconds: float) -> str:
    """One line of the Markdown table."""
    numbers, parent, child = derived.headline(inputs), inputs.parent, inputs.child
    speeds = (numbers.get(f"speedup_{phase}") for phase in ("prefill", "decode", "end_to_end"))
    losses = (model.evaluation.lm_loss_nats_per_token / math.log(2) / bytes_per_token for model in (parent, child))
    perplexities = (model.evaluation.perplexity for model in (parent, child))
    cells = (
        f"{name} ({count_text(parent.parameters)})",
        f"{count_text(child.parameters)} ({percent_text(numbers['parameters_ratio'])})",
        *(times_text(speed) if speed else "–" for speed in speeds),
        percent_text(numbers["top1_kept"]),
        " → ".join(map(number_text, perplexities)),
        " → ".join(map(number_text, losses)),
        number_text(numbers["kl_nats_per_token"]),
        ", ".join(f"{other.replace('_', ' ')} {times_text(ratio)}" for other, ratio in kl_ratios(inputs).items()),
        duration_text(seconds),
    )
    return f"| {' | '.join(cells)} |"


def blocks(architecture: Architecture) -> list[tuple[str, int]]:
    """Block variants and how many layers have them."""
    return Counter(map(str, architecture.layers)).most_common()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, default=DATA / "parents", help="folder of Hugging Face directories")
    parser.add_argument("--train", type=Path, default=DATA / "tinystories/train.json")
    parser.add_argument("--held-out", type=Path, default=DATA / "tinystories/heldout.json")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of all specs"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where specs and stores stay (default: thrown away)")
    options = parser.parse_args()
    parents = sorted(config.parent for config in options.parents.glob("*/config.json"))
    missing = [str(path) for path in (options.train, options.held_out) if not path.exists()]
    if not parents or missing:
        sys.stdout.write(f"nothing to do: {', '.join(missing) or f'a parent in {options.parents}'} not found\n")
        return 0
    rows, lines, failed = [], [], []
    with contextlib.ExitStack() as opened:
        place = options.keep or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        for parent in parents:
            try:
                table_row, line = measure(parent, options, place / parent.name)
                rows.append(table_row)
                lines.append(line)
            except PuzzleError as error:
                failed.append(f"- {parent.name}: {error}")
    header = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    sys.stdout.write("\n".join([*header, *rows, "", *lines, *failed]) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
