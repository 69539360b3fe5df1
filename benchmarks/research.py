"""Re-search of a 70B-class parent for every shipped target: from a score table to an explained answer for each.

The parent has 80 layers and the space 54 block variants per layer. Scores are made up with the structure that METHOD
section 8 reports (benchmarks/search.py); costs are each target's roofline at several batch sizes. The timed part is the
work of the search stage: costs, the exact search over all batch sizes, baselines, frontier, prices and runner-ups.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.puzzle_run import REPOSITORY
from puzzle_core.architecture import Architecture, BlockVariant, ModelShape
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import PuzzleError
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import NONE, number_text
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table
from puzzle_core.search.run_search import find_architecture
from puzzle_core.search.tables import Option, ScoreTable
from puzzle_core.spec import SearchRequest, VariantsSpec
from puzzle_core.target import load_target
from puzzle_core.work import Traffic

SHAPE = ModelShape(
    family="llama", layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn_width=28672, vocabulary=128256,
    tied_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, qk_norm=False,
    max_positions=131072,
)  # fmt: skip
VARIANTS = VariantsSpec(kv_heads=(4, 2, 1), ffn_ratios=(0.87, 0.75, 0.5, 0.25, 0.2, 0.1), ffn_multiple_of=256)
SPECIFICATION = {
    "scenario": {
        "name": "chat",
        "prompt_tokens": 2048,
        "generated_tokens": 256,
        "batch_sizes": [1, 8, 32, 64],
        "limits": {"throughput": "160%", "memory": "75%", "time_to_first_token": "80%"},
    },
    "search": {"frontier_points": 12},
}


def make_scores(seed: int) -> ScoreTable:
    """First layer fragile by two orders of magnitude; attention cheap in the middle; an FFN dear to remove whole."""
    random = np.random.default_rng(seed)
    layers = []
    for layer in range(SHAPE.layers):
        place = layer / (SHAPE.layers - 1)
        fragile = 0.01 * (1 + 100 * np.exp(-2.5 * layer) + 3 * np.exp(-40 * (1 - place)))
        scores = {}
        for block in VARIANTS.blocks_of_layer(layer, SHAPE):
            scores[Option(block)] = 0.0 if block == SHAPE.largest_block else float(fragile * _lost(block, random))
        layers.append(scores)
    return ScoreTable(Architecture.of_parent(SHAPE), tuple(layers), "kl")


def _lost(block: BlockVariant, random: np.random.Generator) -> float:
    attention, ffn = block.attention, block.ffn
    lost = {"sized": 0.3 * (1 - attention.size / SHAPE.kv_heads), "linear": 0.5, "no_op": 0.6}[attention.kind]
    lost += {"sized": 3 * (1 - ffn.size / SHAPE.ffn_width) ** 2, "linear": 5.0, "no_op": 8.0}[ffn.kind]
    return float(lost * random.uniform(0.7, 1.3))


def search(file: Path, scores: ScoreTable) -> tuple[str, ...]:
    """One target; its row of the table."""
    target, request = load_target(file), SearchRequest.model_validate(SPECIFICATION)
    started = time.perf_counter()
    attentions, ffns = VARIANTS.of_layer(0, SHAPE)
    records = {}
    for batch_size in request.scenario.batch_sizes:
        traffic = Traffic(prompt_tokens=2048, generated_tokens=256, batch_size=batch_size)
        records["chat", batch_size] = roofline(SHAPE, (*attentions, *ffns), traffic, target)
    builder = ProblemBuilder(request, scores, cost_table(VARIANTS, SHAPE, records))
    try:
        record = find_architecture(builder)
    except PuzzleError as error:
        return target.name, f"{time.perf_counter() - started:.1f}", NONE, NONE, NONE, str(error).splitlines()[-1]
    seconds, chosen = time.perf_counter() - started, record.best
    speedup = record.parent.total_ms / chosen.prediction.total_ms
    proof = "optimal" if chosen.optimal else f"gap {chosen.gap:.1e}"
    return (
        target.name,
        f"{seconds:.1f}",
        number_text(chosen.score),
        f"{speedup:.2f}x",
        str(record.batch_sizes["chat"]),
        proof,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=REPOSITORY / "deployments/targets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = [file for file in sorted(options.targets.glob("*.yaml")) if load_target(file).costs == "roofline"]
    scores, started = make_scores(options.seed), time.perf_counter()
    rows = [search(file, scores) for file in files]
    rows.append((f"{len(files)} targets", f"{time.perf_counter() - started:.1f}", "", "", "", ""))
    columns = ("target", "seconds", "score", "speed-up", "batch size", "proof")
    sys.stdout.write(f"{format_text(Table('80 layers x 54 block variants', columns, tuple(rows)))}\n")


if __name__ == "__main__":
    main()
