"""`puzzle bench`: how much faster a child is than its parent, in the engine that will serve it."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from flows.cli.export_command import open_child
from puzzle_core.errors import SpecError
from puzzle_core.spec import RuntimeSpec, TargetSpec

BENCH_HELP = "run a child against its parent in torch, llama.cpp or vLLM: rates, time to first token, memory"
log = logging.getLogger("puzzle")


def add_bench_options(bench: argparse.ArgumentParser) -> None:
    """Give `puzzle bench` its options."""
    bench.add_argument("child", metavar="CHILD", help="directory of a child, or a key in --store")
    bench.add_argument(
        "--engine", choices=("torch", "llama.cpp", "vllm"), default="torch", help="(default %(default)s)"
    )
    bench.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory: bench.json, .csv, .png")
    bench.add_argument("--batch", type=_count, nargs="+", default=[1, 4], help="batch sizes (default 1 4)")
    bench.add_argument("--context", type=_count, nargs="+", default=[128], help="prompt tokens (default 128)")
    bench.add_argument("--generate", type=_count, default=64, help="generated tokens (default %(default)s)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default %(default)s)")
    bench.add_argument("--gguf-type", choices=("f32", "f16", "bf16", "q8_0"), help="llama.cpp: type of the weights")
    bench.add_argument("--threads", type=_count, default=1, help="CPU threads (default %(default)s)")
    bench.add_argument("--rounds", type=_count, default=5, help="interleaved rounds (default %(default)s)")
    bench.add_argument("--python", type=Path, metavar="PYTHON", help="vllm: interpreter of an environment that has it")
    bench.add_argument("--store", default=RuntimeSpec().store, help="artifact store (default %(default)s)")


def bench(options: Any) -> None:
    """Run `puzzle bench`."""
    if options.out.exists():
        raise SpecError(f"--out {options.out} exists: name a new directory, or remove it")
    if options.gguf_type and options.engine != "llama.cpp":
        raise SpecError(f"--gguf-type is of --engine llama.cpp, and the engine is {options.engine}: leave it out")
    if options.rounds < 3:
        raise SpecError(f"--rounds is {options.rounds}: medians and spreads take 3 or more")
    directory, _, _ = open_child(options.child, options.store)
    from puzzle_core.bench import run_bench as core
    from puzzle_core.bench.bench_record import as_csv
    from puzzle_core.report.bench_report import bench_figure, bench_text
    from tasks.runtime.locks import machine_lock

    settings = {"dtype": options.dtype, "threads": options.threads, "rounds": options.rounds}
    if options.engine == "llama.cpp":
        settings |= {"engine": "llama.cpp", "gguf_type": options.gguf_type}
    sweep = core.Sweep(options.batch, options.context, options.generate)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with machine_lock("exclusive"):
        target = TargetSpec.model_validate(settings)
        record = core.run(directory, options.engine, target, sweep, options.python, lambda place: log.info("%s", place))
    options.out.mkdir(parents=True)
    (options.out / "bench.csv").write_text(as_csv(record))
    (options.out / "bench.png").write_bytes(bench_figure(record))
    record.write(options.out / "bench.json")
    sys.stdout.write(f"{bench_text(record)}\n\nfigures: {options.out}\n")


def _count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
