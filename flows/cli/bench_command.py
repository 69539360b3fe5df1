"""`puzzle bench`: a child against its parent in the engine that will serve it."""

import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators
from cyclopts.types import PositiveInt

from flows.cli.arguments import STORE, Child, NewDirectory, StoreUrl
from flows.cli.export_command import new_directory, open_child
from puzzle_core.engines import EngineChoice, GgufType, engines_with
from puzzle_core.target import Dtype

log = logging.getLogger("puzzle")
BENCHED = EngineChoice(lambda row: row.bench_module)
SEVERAL = Parameter(consume_multiple=True, show_default=lambda values: " ".join(map(str, values)))


def check_engine(_type: object, name: str) -> None:
    """Validate the name of an engine.

    Raises:
        ValueError: no bench runs in it.
    """
    BENCHED.check(name)


def bench(
    child: Child,
    /,
    *,
    engine: Annotated[
        str, Parameter(validator=check_engine, help=f"One of {', '.join(engines_with(BENCHED.has))}.")
    ] = "torch",
    out: Annotated[NewDirectory, Parameter(help="New directory for bench.json, bench.csv and bench.png.")],
    batch: Annotated[tuple[PositiveInt, ...], SEVERAL, Parameter(help="Batch sizes.")] = (1, 4),
    context: Annotated[tuple[PositiveInt, ...], SEVERAL, Parameter(help="Prompt tokens.")] = (128,),
    generate: Annotated[PositiveInt, Parameter(help="Generated tokens.")] = 64,
    dtype: Annotated[Dtype, Parameter(help="Type of activations and matrix products.")] = "float32",
    gguf_type: Annotated[GgufType | None, Parameter(help="llama.cpp: type of the weights.")] = None,
    threads: Annotated[PositiveInt, Parameter(help="CPU threads.")] = 1,
    rounds: Annotated[
        int,
        Parameter(help="Interleaved rounds; 3 or more, for medians and spreads.", validator=validators.Number(gte=3)),
    ] = 5,
    python: Annotated[
        Path | None, Parameter(metavar="PYTHON", help="vllm: interpreter of an environment that has it.")
    ] = None,
    store: StoreUrl = STORE,
) -> None:
    """Measure rates, time to first token and memory of a child and its parent, and write figures.

    Raises:
        SpecError: `--gguf-type` for an engine that has none, or whatever `run_bench` refuses.
    """
    directory, _, _ = open_child(child, store)
    from puzzle_core.bench.bench_record import as_csv
    from puzzle_core.bench.run_bench import Sweep, bench_target, run_bench
    from puzzle_core.report.bench_report import bench_figure, bench_text
    from tasks.runtime.locks import machine_lock

    target = bench_target(engine, gguf_type, {"dtype": dtype, "threads": threads, "rounds": rounds})
    sweep = Sweep(batch, context, generate)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with new_directory(out) as staged:
        with machine_lock("exclusive"):
            record = run_bench(directory, engine, target, sweep, python, lambda line: log.info("%s", line))
        (staged / "bench.csv").write_text(as_csv(record))
        (staged / "bench.png").write_bytes(bench_figure(record))
        record.write(staged / "bench.json")
    sys.stdout.write(f"{bench_text(record)}\n\nfigures: {out}\n")
