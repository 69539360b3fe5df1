"""The exact search on instances of a 70B- and a 405B-class parent: time to proven optimum, beside PuLP with CBC.

`solves`: 80 x 54 and 126 x 54 tables under memory, throughput and latency limits, from loose to tight, several seeds.
Every answer is proven within a relative gap of 1e-6. PuLP solves the same instance in the same run, written as METHOD
section 6 has it, with the same gap and one thread; its answer is recomputed and the two objectives are compared.
`explanations`: the time for all prices and runners-up beside that for the answer, and how wide their intervals are.
`frontier`: the best score over all batch sizes along a range of throughputs, each batch size with its own costs.

Costs are a roofline of eight devices with some noise, one for each variant and batch size; scores are random
with the structure of METHOD section 8: over several orders of magnitude, the first layer most fragile by two of them,
attention cheapest to remove in the middle and late layers, an FFN dear to remove whole.

PuLP is optional: `pip install -e '.[benchmarks]'`.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.search.frontier import SweepPoint, capacity_range, sweep_frontier
from puzzle_core.search.mip import solve
from puzzle_core.search.problem import Limit, Problem, Solution
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.rules import UNCOUNTED, AtMostDistinct
from puzzle_core.search.run_search import find_solutions
from puzzle_core.search.sensitivity import explain
from puzzle_core.search.tables import CostRow, CostTable, Option, ScoreTable
from puzzle_core.spec import SearchRequest

PROMPT_TOKENS, GENERATED_TOKENS, DTYPE_BYTES = 2048, 256, 2
DEVICES, FLOPS, BYTES_PER_S = 8, 400e12, 2.4e12
KV_HEADS = (8, 4, 2, 1, "linear", "no_op")
FFN_RATIOS = (1.0, 0.87, 0.75, 0.5, 0.25, 0.2, 0.1, "linear", "no_op")
OPTIONS = [(heads, ratio) for heads in KV_HEADS for ratio in FFN_RATIOS]
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
NOISE = 0.02
PARTS = ("solves", "explanations", "frontier")
GAP = 1e-6


class Shape(NamedTuple):
    """A parent, 64 or 128 query heads of 128 wide."""

    layers: int
    hidden: int
    heads: int
    ffn: int


SHAPES = (Shape(80, 8192, 64, 28672), Shape(126, 16384, 128, 53248))


class Subblock(NamedTuple):
    """Parameters, KV entries per token, and query heads that attend."""

    parameters: int
    kv_entries: int
    heads: int


def subblock(shape: Shape, part: str, variant: float | str) -> Subblock:
    """The size of one variant of attention or FFN."""
    if variant == "no_op":
        return Subblock(0, 0, 0)
    if variant == "linear":
        return Subblock(shape.hidden**2, 0, 0)
    if part == "ffn":
        return Subblock(3 * shape.hidden * 256 * round(float(variant) * shape.ffn / 256), 0, 0)
    width = int(variant) * 128
    return Subblock(2 * shape.hidden * (128 * shape.heads + width), 2 * width, shape.heads)


def times_ms(part: Subblock, batch_size: int) -> tuple[float, float]:
    """Prefill of the prompts, and decode of all generated tokens: the slower of arithmetic and memory traffic."""
    tokens = batch_size * PROMPT_TOKENS
    scores = 2 * PROMPT_TOKENS * 128 * part.heads
    prefill_s = tokens * (2 * part.parameters + scores) / (DEVICES * FLOPS)
    arithmetic_s = 2 * part.parameters * batch_size / (DEVICES * FLOPS)
    mean_context = PROMPT_TOKENS + GENERATED_TOKENS / 2
    read = DTYPE_BYTES * (part.parameters + batch_size * mean_context * part.kv_entries)
    step_s = max(arithmetic_s, read / (DEVICES * BYTES_PER_S))
    return 1e3 * prefill_s, 1e3 * GENERATED_TOKENS * step_s


def block_costs(shape: Shape, batch_size: int, seed: int) -> dict[str, np.ndarray]:
    """All resources of the 54 block variants, equal in all layers."""
    random = np.random.default_rng([seed, batch_size])
    measured = {}
    for part, variants in (("attention", KV_HEADS), ("ffn", FFN_RATIOS)):
        for variant in variants:
            size = subblock(shape, part, variant)
            measured[part, variant] = size, np.array(times_ms(size, batch_size)) * random.normal(1.0, NOISE, 2)
    rows = []
    for heads, ratio in OPTIONS:
        (attention, attention_ms), (ffn, ffn_ms) = measured["attention", heads], measured["ffn", ratio]
        kept = batch_size * (PROMPT_TOKENS + GENERATED_TOKENS) * attention.kv_entries
        memory = DTYPE_BYTES * (attention.parameters + ffn.parameters + kept)
        prefill, decode = attention_ms + ffn_ms
        rows.append((memory, prefill, (prefill + decode) / batch_size))
    return dict(
        zip(("memory_bytes", "prefill_ms", "total_ms_per_sequence"), np.array(rows, dtype=float).T, strict=True)
    )


def block_scores(layers: int, seed: int) -> tuple[np.ndarray, ...]:
    """Replace-1-block scores, KL in nats per token, one array of 54 per layer."""
    random = np.random.default_rng(seed)
    shares = {
        "attention": np.array([0.0, 0.05, 0.15, 0.3, 0.8, 1.0]),
        "ffn": np.array([0.0, 0.02, 0.05, 0.2, 0.6, 0.75, 1.3, 3.0, 6.0]),
    }
    scores = []
    for layer in range(layers):
        depth, last = layer / (layers - 1), layers - 1 - layer
        edge = 100.0 * np.exp(-layer / 1.2) + 8.0 * (layer < 3) + 6.0 * np.exp(-last / 2.0)
        fragile = {"attention": 2e-3 * (0.6 + edge + 1.5 * (1 - depth) ** 2), "ffn": 6e-3 * (1.0 + edge)}
        part = {
            name: share * fragile[name] * np.exp(random.normal(0, 0.5) + random.normal(0, 0.2, share.size))
            for name, share in shares.items()
        }
        both = part["attention"][:, None] + part["ffn"][None, :]
        composed = np.outer(shares["attention"] > 0, shares["ffn"] > 0)
        scores.append(np.where(composed, 0.75 * both * np.exp(random.normal(0, 0.1, both.shape)), both).ravel())
    return tuple(scores)


def instance(shape: Shape, seed: int, batch_size: int, shares: Sequence[float]) -> Problem:
    """One problem; `shares` of the parent's own memory, time per sequence and prefill time are its limits."""
    costs = block_costs(shape, batch_size, seed)
    limits = (
        Limit("memory", "memory_bytes", shares[0] * shape.layers * costs["memory_bytes"][0], "bytes"),
        Limit(
            "throughput", "total_ms_per_sequence", shares[1] * shape.layers * costs["total_ms_per_sequence"][0], "ms"
        ),
        Limit("latency", "prefill_ms", shares[2] * shape.layers * costs["prefill_ms"][0], "ms"),
    )
    ids = tuple(f"attn:{heads}|ffn:{ratio}" for heads, ratio in OPTIONS)
    return Problem(
        options=(ids,) * shape.layers,
        score=block_scores(shape.layers, seed),
        parent=(0,) * shape.layers,
        resources={name: (values,) * shape.layers for name, values in costs.items()},
        limits=limits,
    )


def of_few_widths(problem: Problem, widths: int) -> Problem:
    """The same problem with at most so many different FFN widths."""
    group = [FFN_RATIOS.index(ratio) if isinstance(ratio, float) else UNCOUNTED for _, ratio in OPTIONS]
    rule = AtMostDistinct("FFN widths", (np.array(group),) * len(problem.options), widths)
    return Problem(problem.options, problem.score, problem.parent, problem.resources, problem.limits, (rule,))


class CbcAnswer(NamedTuple):
    """What PuLP returned; the objective is recomputed from its choice."""

    seconds: float
    objective: float
    feasible: bool


def solve_with_cbc(problem: Problem, time_limit_s: float) -> CbcAnswer:
    """The plain formulation; seconds count building, writing, solving and reading, as a user of PuLP waits for."""
    import pulp

    started = time.perf_counter()
    model: Any = pulp.LpProblem("search", pulp.LpMinimize)
    x = [
        [pulp.LpVariable(f"x_{i}_{j}", cat="Binary") for j in range(len(ids))] for i, ids in enumerate(problem.options)
    ]
    pairs = [(i, j) for i, ids in enumerate(problem.options) for j in range(len(ids))]
    model += pulp.lpSum(float(problem.score[i][j]) * x[i][j] for i, j in pairs)
    for row in x:
        model += pulp.lpSum(row) == 1
    for limit in problem.limits:
        column, unit = problem.resources[limit.resource], limit.capacity
        model += pulp.lpSum(float(column[i][j] / unit) * x[i][j] for i, j in pairs) <= 1.0
    model.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=GAP, timeLimit=time_limit_s))
    seconds = time.perf_counter() - started
    choice = [max(range(len(row)), key=lambda j, row=row: row[j].value() or 0.0) for row in x]
    feasible = problem.feasible(choice, tolerance=1e-6)
    return CbcAnswer(seconds, problem.total_score(choice), feasible)


def solves_table(seeds: int, shares: Sequence[float], cbc_limit_s: float, shapes: Sequence[Shape]) -> Table:
    """One row per shape, limits and form; both solvers on every instance, one after the other."""
    with_cbc = importlib.util.find_spec("pulp") is not None and cbc_limit_s > 0
    rows = []
    for shape in shapes:
        for share in shares:
            problems = [instance(shape, seed, 64, (share, share, min(share + 0.05, 1.0))) for seed in range(seeds)]
            ours, theirs = [], []
            for problem in problems:
                started = time.perf_counter()
                solution = solve(problem, relative_gap=GAP)
                ours.append((time.perf_counter() - started, solution))
                if with_cbc:
                    theirs.append(solve_with_cbc(problem, cbc_limit_s))
            rows.append(
                (f"{shape.layers} x {len(OPTIONS)}", f"{share:.0%}", *_solve_cells(ours), *_cbc_cells(ours, theirs))
            )
            few = [(_timed(of_few_widths(problem, 3))) for problem in problems]
            rows.append((f"{shape.layers} x {len(OPTIONS)}, 3 widths", f"{share:.0%}", *_solve_cells(few), *[""] * 4))
    note = "CBC: PuLP's, the same gap, one thread. Difference: (CBC - ours) / ours of the recomputed scores."
    return Table(
        title=f"Time to proven optimum, {seeds} seeds each, relative gap {GAP:g}",
        columns=(
            *("table", "of the parent", "median, s", "worst, s", "proven", "worst gap"),
            *("CBC median, s", "CBC worst, s", "difference, least", "most"),
        ),
        rows=tuple(rows),
        text_columns=2,
        note=note if with_cbc else "PuLP is not asked or not there; pip install -e '.[benchmarks]'.",
    )


def _timed(problem: Problem) -> tuple[float, Solution]:
    started = time.perf_counter()
    solution = solve(problem, relative_gap=GAP)
    return time.perf_counter() - started, solution


def _solve_cells(answers: list[tuple[float, Solution]]) -> tuple[str, ...]:
    seconds = [second for second, _ in answers]
    proven = sum(solution.optimal for _, solution in answers)
    worst = max(solution.gap for _, solution in answers)
    return f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}", f"{proven}/{len(answers)}", f"{worst:.0e}"


def _cbc_cells(ours: list[tuple[float, Solution]], theirs: list[CbcAnswer]) -> tuple[str, ...]:
    if not theirs:
        return ("",) * 4
    seconds = [answer.seconds for answer in theirs]
    differences = [
        (answer.objective - solution.objective) / solution.objective
        for (_, solution), answer in zip(ours, theirs, strict=True)
        if answer.feasible
    ]
    found = [f"{min(differences):+.0e}", f"{max(differences):+.0e}"] if differences else ["none", "none"]
    return f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}", *found


def wide_instance(layers: int, options: int, seed: int) -> Problem:
    """Two limits at 60 % of the parent, no two options of one cost: few options are beaten by another."""
    random = np.random.default_rng(seed)
    weight = np.linspace(1.0, 0.0, options)
    score = [1e-3 * np.exp(random.normal()) * (1 - weight) * random.uniform(0.7, 1.3, options) for _ in range(layers)]
    columns = {
        name: tuple(weight * random.uniform(0.9, 1.1, options) for _ in range(layers)) for name in ("memory", "time")
    }
    limits = [Limit(name, name, 0.6 * sum(float(x[0]) for x in column), "") for name, column in columns.items()]
    ids = tuple(f"v{index}" for index in range(options))
    return Problem((ids,) * layers, tuple(score), (0,) * layers, columns, tuple(limits))


def answer_seconds(shape: Shape, seed: int, share: float) -> float:
    """CPU seconds of a whole answer, from tables to predictions, for about the limits of `instance`."""
    subblocks = {
        "attn": [f"kv{heads}" if isinstance(heads, int) else heads for heads in KV_HEADS],
        "ffn": [f"i{256 * round(r * shape.ffn / 256)}" if isinstance(r, float) else r for r in FFN_RATIOS],
    }
    blocks = [BlockVariant.parse(f"attn:{a}+ffn:{f}") for a, f in itertools.product(*subblocks.values())]
    costs, scores = block_costs(shape, 64, seed), block_scores(shape.layers, seed)
    costs["decode_ms"] = np.maximum(costs.pop("total_ms_per_sequence") * 64 - costs["prefill_ms"], 0.0)
    started = time.process_time()
    rows = [CostRow(str(block), {n: float(c[i]) for n, c in costs.items()}) for i, block in enumerate(blocks)]
    layers = tuple(dict(zip(map(Option, blocks), values.tolist(), strict=True)) for values in scores)
    text, first = f"{share:.0%}", f"{min(share + 0.05, 1.0):.0%}"
    limits = {"memory": text, "latency": text, "time_to_first_token": first}
    request = SearchRequest.model_validate({"scenario": {"batch_sizes": [64], "limits": limits}})
    find_solutions(
        ProblemBuilder(
            request, ScoreTable(Architecture(layers=(blocks[0],) * len(layers)), layers), CostTable(tuple(rows))
        )
    )
    return time.process_time() - started


def explanations_table(seeds: int, shares: Sequence[float]) -> Table:
    """One row per problem, CPU seconds; one thread does everything."""
    shape, whole = SHAPES[0], {}
    problems = {
        f"{shape.layers} x {len(OPTIONS)}, {share:.0%}, seed {seed}": instance(
            shape, seed, 64, (share, share, min(share + 0.05, 1.0))
        )
        for share in shares
        for seed in range(seeds)
    }
    for name, (share, seed) in zip(problems, itertools.product(shares, range(seeds)), strict=True):
        whole[name] = answer_seconds(shape, seed, share)
    problems |= {
        f"{layers} x {options}": wide_instance(layers, options, 0) for layers, options in ((8, 25), (400, 200))
    }
    rows = []
    for name, problem in problems.items():
        started = time.process_time()
        solution = solve(problem, relative_gap=GAP)
        solved = time.process_time()
        _, others = explain(problem, solution)
        explained_s, solve_s = time.process_time() - solved, solved - started
        widths = [1 - other.at_least / other.at_most for other in others if 0 < other.at_most < np.inf]
        exact = sum(other.at_most - other.at_least <= 1e-3 * other.at_most for other in others)
        named = sum(len(other.options) == 1 for other in others)
        cells = (f"{solve_s:.2f}", f"{whole[name]:.2f}" if name in whole else "", f"{explained_s:.2f}")
        rows.append((name, *cells, f"{exact}/{len(others)}", f"{named}/{len(others)}", f"{np.median(widths):.0%}"))
    return Table(
        title="Prices and runners-up beside the answer",
        columns=("problem", "solve, s", "answer, s", "explained, s", "exact", "one option", "median width"),
        rows=tuple(rows),
        note="CPU seconds. Answer: with tables and predictions. Width: of an interval, relative to its upper end.",
    )


def frontier_table(shape: Shape, seeds: int, points: int) -> Table:
    """The throughput frontier over twelve batch sizes, memory for 60 % of what batch 64 takes, no other limit."""
    rows = []
    for seed in range(seeds):
        memory = 0.6 * shape.layers * block_costs(shape, 64, seed)["memory_bytes"][0]
        problems = {}
        for batch_size in BATCH_SIZES:
            full = instance(shape, seed, batch_size, (1.0, 1.0, 1.0))
            throughput = full.limits[1]
            problems[batch_size] = full.with_limits([Limit("memory", "memory_bytes", memory, "bytes"), throughput])
        cpu, started = time.process_time(), time.perf_counter()
        ranges = [capacity_range(problem, "throughput") for problem in problems.values()]
        capacities = np.linspace(min(r[0] for r in ranges), max(r[1] for r in ranges), points).tolist()
        swept = sweep_frontier(problems, "throughput", dict.fromkeys(problems, capacities), relative_gap=GAP)
        rows.append((str(seed), *_frontier_cells(swept, time.perf_counter() - started, time.process_time() - cpu)))
    return Table(
        title=f"Frontier of {points} points over {len(BATCH_SIZES)} batch sizes, {shape.layers} x {len(OPTIONS)}",
        columns=("seed", "wall, s", "CPU, s", "points with an answer", "proven", "batch sizes that win"),
        rows=tuple(rows),
        note="Finding the range of each batch size is counted. One thread.",
    )


def _frontier_cells(swept: list[SweepPoint[int] | None], wall_s: float, cpu_s: float) -> tuple[str, ...]:
    answered = [point for point in swept if point is not None]
    proven = sum(point.solution.optimal for point in answered)
    winners = sorted({point.key for point in answered})
    return f"{wall_s:.1f}", f"{cpu_s:.1f}", str(len(answered)), f"{proven}/{len(answered)}", " ".join(map(str, winners))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=[*PARTS], choices=PARTS)
    parser.add_argument("--layers", nargs="*", type=int, default=[80, 126], choices=[80, 126])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.85, 0.7, 0.5, 0.3], help="of the parent's costs")
    parser.add_argument("--points", type=int, default=40, help="of the frontier (default %(default)s)")
    parser.add_argument("--frontier-seeds", type=int, default=2)
    parser.add_argument("--cbc-seconds", type=float, default=60.0, help="time limit for each of CBC's; 0 leaves it out")
    options = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.layers in options.layers]
    tables = []
    if "solves" in options.parts:
        tables.append(solves_table(options.seeds, options.shares, options.cbc_seconds, shapes))
    if "explanations" in options.parts:
        tables.append(explanations_table(min(options.seeds, 3), options.shares))
    if "frontier" in options.parts:
        tables += [frontier_table(shape, options.frontier_seeds, options.points) for shape in shapes]
    sys.stdout.write("\n\n".join(format_text(table) for table in tables) + f"\n\n{len(os.sched_getaffinity(0))} CPUs\n")


if __name__ == "__main__":
    main()
