"""Exact scores against estimates from gradients (`scoring.method: fisher`): compute, order, and the answer of a search.

    python -m benchmarks.scoring_methods SPEC [--set runtime.store=...]    # a spec whose library is in its store

Every block of the search space is scored by both ways in one process and one thread, from the same stored states, with
the weights of the library. Compute is CPU time of the process; the capture of the states is common to both and not
counted. An architecture that is found with estimates is judged by its exact scores, beside the optimum of these;
costs are those of a data sheet (`--target`), since times do not matter here. The compute of lazy scores is that of the
estimates, the searches and the exact scores that they ask for; its range is over the limits.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from scipy.stats import spearmanr

from benchmarks.planned import captured, planned
from puzzle_core import fisher, scoring
from puzzle_core.architecture import Architecture
from puzzle_core.cost.roofline import roofline
from puzzle_core.model.surgery import load_weights
from puzzle_core.plan import Plan
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.search.lazy import Place, lazy_scores, next_to_score, not_exact
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, score_table
from puzzle_core.search.run_search import find_solutions
from puzzle_core.search.tables import Option
from puzzle_core.spec import LimitsSpec
from puzzle_core.spec_file import load_spec
from puzzle_core.state_dict import State
from puzzle_core.target import load_target
from puzzle_core.work import ScoreRecord, ScoreWork
from tasks.runtime.context import RunContext

BANDS = (0.0, 0.05, 0.2, 0.5, float("inf"))
T = TypeVar("T")


def timed(act: Callable[[], T]) -> tuple[T, float]:
    """A result and the CPU seconds that it took."""
    started = time.process_time()
    return act(), time.process_time() - started


def weights_of(work: ScoreWork, context: RunContext) -> dict[str, State]:
    """The trained weights of a block, by variant id."""
    return {name: load_weights(context.store().fetch(key)) for name, key in work.trained.items()}


def builder_of(plan: Plan, scores: Sequence[ScoreRecord], share: str) -> ProblemBuilder:
    """The search with these scores, at this share of the parent's time in blocks."""
    spec = plan.spec
    costs = {at: roofline(plan.inputs.shape, w.variants, w.traffic, w.target) for at, w in plan.costs().items()}
    search = spec.search.model_copy(update={"baselines": (), "explain": False, "solutions": 1, "shortlist": 1})
    scenario = spec.scenario.model_copy(update={"limits": LimitsSpec(block_time=share)})
    request = spec.request.model_copy(update={"search": search, "scenario": scenario})
    table = score_table(scores, spec.scoring.composition, "kl", plan.variants, plan.inputs.shape)
    return ProblemBuilder(request, table, cost_table(plan.variants, plan.inputs.shape, costs))


def best_architecture(plan: Plan, scores: Sequence[ScoreRecord], share: str) -> Architecture:
    """The answer of the search."""
    return find_solutions(builder_of(plan, scores, share)).best.architecture


def lazily(
    plan: Plan, estimates: Sequence[ScoreRecord], exact: dict[Place, ScoreRecord], share: str, with_frontier: bool
) -> tuple[Architecture, set[Place]]:
    """The answer of a lazy search, and the blocks that it scored exactly, for the answer or for the frontier too."""
    known: dict[Place, ScoreRecord] = {}
    composition, own = plan.spec.scoring.composition, Architecture.of_parent(plan.inputs.shape)
    while True:
        builder = builder_of(plan, lazy_scores(estimates, list(known.values())), share)
        asked = not_exact(find_solutions(builder).solutions, composition, own, known)
        if not asked and with_frontier:
            asked = next_to_score(builder.request, builder.scores, builder.costs, composition, known)
        if not asked:
            return find_solutions(builder).best.architecture, set(known)
        known |= {place: exact[place] for place in asked}


def total(plan: Plan, scores: Sequence[ScoreRecord], architecture: Architecture) -> float:
    """The sum of an architecture's scores."""
    table = score_table(scores, plan.spec.scoring.composition, "kl", plan.variants, plan.inputs.shape)
    return sum(table.layers[layer][Option(block)] for layer, block in enumerate(architecture.layers))


def methods_table(plan: Plan, context: RunContext, samples: Sequence[int], shares: Sequence[str], place: Path) -> Table:
    """One row per way to score."""
    activations = captured(plan, context, "scoring", plan.spec.scoring.dtype, place / "states")
    activations.capture_log_probabilities()
    works = plan.all_scores()
    weights = [weights_of(work, context) for work in works]
    timed_scores = [
        timed(lambda work=work, w=w: scoring.score_block(work, activations, w))
        for work, w in zip(works, weights, strict=True)
    ]
    exact, exact_s = [score for score, _ in timed_scores], sum(seconds for _, seconds in timed_scores)
    seconds_of = {(score.layer, score.option): seconds for score, seconds in timed_scores}
    exact_of = {(score.layer, score.option): score for score in exact}
    kl = [score.kl_nats_per_token for score in exact]
    optimum = {share: best_architecture(plan, exact, share) for share in shares}
    rows = [("exact", "", f"{exact_s:.1f}", "1.0", "1.0000", *["1.00"] * (len(BANDS) - 1), *["0.0 %"] * len(shares))]
    for number in samples:
        estimating = plan.spec.scoring.model_copy(update={"method": "fisher", "label_samples": number})
        estimated = Plan(plan.spec.model_copy(update={"scoring": estimating}), plan.inputs)
        work, out = estimated.gradients(), place / f"gradients-{number}"
        assert work is not None
        out.mkdir()
        _, gradients_s = timed(lambda work=work, out=out: fisher.measure_gradients(work, activations, out))
        found, found_s = timed(
            lambda out=out: [
                fisher.estimate_score(work, activations, w, out) for work, w in zip(works, weights, strict=True)
            ]
        )
        estimates = [score.kl_nats_per_token for score in found]
        ratios = [
            [a / b for a, b in zip(estimates, kl, strict=True) if low <= b < high]
            for low, high in itertools.pairwise(BANDS)
        ]
        above = []
        for share in shares:
            best = total(plan, exact, optimum[share])
            chosen = total(plan, exact, best_architecture(plan, found, share))
            above.append(f"{chosen / best - 1:.1%}".replace("%", " %"))
        rows.append(
            (
                f"fisher, {number} samples",
                f"{gradients_s:.1f}",
                f"{found_s:.1f}",
                f"{exact_s / (gradients_s + found_s):.1f}",
                f"{spearmanr(estimates, kl).statistic:.4f}",
                *(f"{statistics.median(band):.2f}" if band else "" for band in ratios),
                *above,
            )
        )
        for with_frontier in (False, True):
            columns, faster = [], []
            for share in shares:
                (architecture, asked), search_s = timed(
                    lambda share=share, found=found, with_frontier=with_frontier: lazily(
                        plan, found, exact_of, share, with_frontier
                    )
                )
                above_best = total(plan, exact, architecture) / total(plan, exact, optimum[share]) - 1
                columns.append(f"{above_best:.1%} ({len(asked)})".replace("%", " %"))
                in_all = gradients_s + found_s + search_s + sum(seconds_of[place] for place in asked)
                faster.append(exact_s / in_all)
            name = f"lazy, {number} samples" + (f", frontier of {plan.spec.search.frontier_points}" * with_frontier)
            least, most = f"{min(faster):.1f}", f"{max(faster):.1f}"
            rows.append((name, "", "", f"{least} to {most}", "", *[""] * (len(BANDS) - 1), *columns))
    bands = [f"to {high:g}" if high < BANDS[-1] else "above" for high in BANDS[1:]]
    return Table(
        title=f"{len(works)} blocks of {len(plan.layers)} layers, {activations.ids_NT.numel():,} tokens: CPU seconds, "
        "Spearman, median ratio of estimate to KL by size of KL, and by limit on the time in blocks how far the answer "
        "is above the optimum in exact scores (of as many blocks)",
        columns=("", "gradients, s", "scores, s", "faster", "Spearman", *bands, *shares),
        rows=tuple(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="whose library is in its store")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--target", type=Path, default=Path("deployments/targets/l40s.yaml"), help="a data sheet")
    parser.add_argument("--samples", nargs="*", type=int, default=[2, 8], help="of labels (default %(default)s)")
    parser.add_argument("--shares", nargs="*", default=["90%", "75%", "60%", "50%", "40%"], help="limits on block time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = load_spec(options.spec, tuple(options.overrides))
    scoring_spec = spec.scoring.model_copy(update={"method": "exact"})
    plan, context = planned(spec.model_copy(update={"target": load_target(options.target), "scoring": scoring_spec}))
    with tempfile.TemporaryDirectory() as place:
        table = methods_table(plan, context, options.samples, options.shares, Path(place))
    sys.stdout.write(f"{format_text(table)}\n")


if __name__ == "__main__":
    main()
