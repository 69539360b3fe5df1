"""Iterated Puzzle beside one step, at equal tokens and equal cost: `python -m benchmarks.iterated DIR`.

Both runs have the quickstart's parent and space, or those of another parent with `--parent`. They share one store, so
that they decide with the same costs. The one step trains every variant and the child on all tokens. Of two rounds, each
trains variants on half of BLD's tokens, the first at a milder limit; GKD's tokens are shared out to both children.
"""

import argparse
import sys
from pathlib import Path

import yaml

from benchmarks.puzzle_run import last_report, manifests, open_store, run_puzzle
from benchmarks.real_parents import DATA, QUICKSTART, make_spec
from puzzle_core.report import derived
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import count_text, number_text, percent_text, times_text


def main() -> None:
    """Run both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path, help="a new directory, for the store of both runs")
    parser.add_argument("--bld-tokens", type=int, default=49_152, help="tokens per variant of the one step")
    parser.add_argument("--gkd-tokens", type=int, default=393_216, help="tokens of all distillations of a run")
    parser.add_argument("--first-share", type=float, default=0.25, help="share of GKD's tokens for the first round")
    parser.add_argument("--limit", default="60%", help="block time at the end")
    parser.add_argument("--milder", default="78%", help="block time of the first round's child")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents and windows")
    parser.add_argument("--parent", type=Path, help="a Hugging Face directory, with texts of its own")
    parser.add_argument("--train", type=Path, default=DATA / "tinystories/train.json", help="its training texts")
    parser.add_argument("--held-out", type=Path, default=DATA / "tinystories/heldout.json", help="its held-out texts")
    arguments = parser.parse_args()
    arguments.place.mkdir(parents=True, exist_ok=True)
    spec, batch = QUICKSTART, 512
    if arguments.parent:
        spec = arguments.place / f"{arguments.parent.name}.yaml"
        spec.write_text(yaml.safe_dump(make_spec(arguments.parent, arguments.train, arguments.held_out)))
    first = round(arguments.gkd_tokens * arguments.first_share / batch) * batch
    rounds = f"[{{limits: {{block_time: {arguments.milder}}}, gkd: {{tokens: {first}}}}}]"
    shared = [
        f"data.seed={arguments.seed}",
        "scenario.batch_sizes=[8]",
        f"scenario.limits={{block_time: {arguments.limit}}}",
        "scoring.tokens=4096",
        "scoring.composition=subblocks",
        "search.baselines=[]",
        "search.frontier_points=2",
        "evaluation.timing_rounds=3",
    ]
    runs = {
        "one step": [f"bld.tokens={arguments.bld_tokens}", f"gkd.tokens={arguments.gkd_tokens}"],
        "two rounds": [
            f"bld.tokens={arguments.bld_tokens // 2}",
            f"gkd.tokens={arguments.gkd_tokens - first}",
            f"rounds={rounds}",
        ],
    }
    rows, before = [], dict.fromkeys(("bld", "gkd"), 0)
    for name, changes in runs.items():
        run_puzzle(spec, [*shared, *changes], arguments.place)
        store = open_store(arguments.place)
        tokens = {stage: sum(int(made.record["tokens"]) for made in manifests(store, stage)) for stage in before}
        rows.append(_row(name, {stage: tokens[stage] - before[stage] for stage in before}, last_report(store)))
        before = tokens
    columns = ("", "BLD tokens", "GKD tokens", "block time predicted", "parameters", "KL", "KL after GKD")
    table = Table("Iterated Puzzle", (*columns, "perplexity", "top-1 kept"), tuple(rows), text_columns=1)
    sys.stdout.write(f"{format_text(table)}\n")


def _row(name: str, tokens: dict[str, int], inputs: ReportInputs) -> tuple[str, ...]:
    parent, (assembled, *_, child) = inputs.parent.evaluation, inputs.children
    return (
        name,
        *(count_text(number) for number in tokens.values()),
        percent_text(derived.block_time_share(inputs, inputs.search.best.prediction)),
        percent_text(child.parameters / inputs.parent.parameters),
        number_text(assembled.evaluation.kl_nats_per_token),
        number_text(child.evaluation.kl_nats_per_token),
        times_text(child.evaluation.perplexity / parent.perplexity),
        percent_text(child.evaluation.top1_accuracy / parent.top1_accuracy),
    )


if __name__ == "__main__":
    main()
