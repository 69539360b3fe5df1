"""Processor seconds of BLD and of GKD in float32 and in bfloat16: whether `dtype: auto` pays on this machine.

    python -m benchmarks.compute_dtype --parent DIRECTORY

One FFN variant of half the width is trained on 2,048 tokens, and one window of GKD goes forward and back, in both types
by turns and on one thread. Processor time counts, since it depends less on other work than the clock's.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.parents import open_parent
from puzzle_core.architecture import Variant
from puzzle_core.device import default_device, device_name, fast_dtype
from puzzle_core.distill import bld, gkd
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_parent
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.spec import BldSpec, Dtype, GkdSpec
from puzzle_core.work import BldWork

TYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
LAYER = 1


def bld_run(parent: Parent, ids_NT: torch.Tensor, dtype: Dtype, place: Path) -> Callable[[], object]:
    """The training of one variant."""
    activations = Activations(place / dtype, parent, ids_NT, torch_dtype(dtype), default_device())
    activations.capture_embedding()
    for layer in range(LAYER + 1):
        activations.capture_layer(layer)
    save_file({f"layer.{LAYER}": torch.rand(parent.shape.ffn_width)}, place / "contributions.safetensors")
    variant = Variant.parse(f"ffn:i{parent.shape.ffn_width // 2}")
    spec = BldSpec(tokens=ids_NT.numel(), batch_tokens=4 * ids_NT.shape[1], dtype=dtype)
    work = BldWork(parent="p", layer=LAYER, variant=variant, tokens="t", contributions="c", seed=0, spec=spec)
    return lambda: bld.train_variant(work, activations, place, place)


def gkd_run(parent: Parent, ids_NT: torch.Tensor, dtype: Dtype) -> Callable[[], object]:
    """One window through the parent and a child that equals it, forward and back."""
    device = default_device()
    frozen, child = load_parent(parent, torch.float32, device), load_parent(parent, torch.float32, device)
    child.requires_grad_(True)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            terms = gkd.loss_terms(frozen, child, ids_NT[:1].long().to(device), GkdSpec())
        torch.stack(list(terms.values())).sum().backward()
        child.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, help="Hugging Face directory (default the example parent)")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        parent = open_parent(options.parent, place)
        generator, shape = torch.Generator().manual_seed(0), (8, min(256, parent.shape.max_positions))
        ids_NT = torch.randint(parent.shape.vocabulary, shape, generator=generator, dtype=torch.int32)
        for name, made in (
            ("BLD of one FFN variant", {dtype: bld_run(parent, ids_NT, dtype, place) for dtype in TYPES}),
            ("GKD of one window", {dtype: gkd_run(parent, ids_NT, dtype) for dtype in TYPES}),
        ):
            seconds: dict[str, list[float]] = {dtype: [] for dtype in TYPES}
            for number in range(options.rounds + 1):
                for dtype, run in made.items():
                    started = time.process_time()
                    run()
                    if number:
                        seconds[dtype].append(time.process_time() - started)
            full, half = (statistics.median(seconds[dtype]) for dtype in TYPES)
            rows.append((name, f"{full:.2f}", f"{half:.2f}", f"{full / half:.2f}x"))
    title = f"{device_name(default_device())}, where auto is {fast_dtype(default_device())}"
    columns = ("", "float32, s", "bfloat16, s", "as fast")
    sys.stdout.write(f"{format_text(Table(title, columns, tuple(rows)))}\n")


if __name__ == "__main__":
    main()
