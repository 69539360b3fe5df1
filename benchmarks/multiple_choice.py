"""Accuracy of one parent on files of multiple-choice items, as a Markdown table for docs/results.md.

The function is that of the evaluation stage (puzzle_core/multiple_choice.py), in float32. Tokens per second count those
of the forward passes, where the choices of a query share it.

    python -m benchmarks.multiple_choice PARENT FILE... --limit 500
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

from puzzle_core.benchmark_items import read_items
from puzzle_core.device import default_device
from puzzle_core.errors import PuzzleError
from puzzle_core.model.child import load_parent
from puzzle_core.multiple_choice import answer_items
from puzzle_core.spec import ParentSpec
from tasks.runtime.opened_parent import open_parent

HEAD = """| benchmark | items | accuracy | accuracy by length | seconds | tok/s |
|---|---:|---:|---:|---:|---:|"""


def main() -> int:
    """Print one line per file, as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", help="as `parent.path` of a specification")
    parser.add_argument("files", type=Path, nargs="+", help="files of JSON Lines (docs/formats.md)")
    parser.add_argument("--limit", type=int, default=None, help="items of each file, from its start; default all")
    options = parser.parse_args()
    try:
        parent = open_parent(ParentSpec(path=options.parent), Path(".puzzle/scratch"))
        model, tokenizer = load_parent(parent, torch.float32, default_device()), parent.tokenizer()
        sys.stdout.write(HEAD + "\n")
        for file in options.files:
            name, tokens = file.name.partition(".")[0], [0]
            start = time.perf_counter()
            result = answer_items(
                model,
                tokenizer,
                name,
                read_items(file, options.limit),
                lambda done, total, tokens=tokens: tokens.append(total),
            )
            seconds = time.perf_counter() - start
            sys.stdout.write(
                f"| {name} | {result.items:,} | {result.accuracy:.3f} ± {result.standard_error:.3f} | "
                f"{result.accuracy_by_length:.3f} ± {result.standard_error_by_length:.3f} | {seconds:,.0f} | "
                f"{tokens[-1] / seconds:,.0f} |\n"
            )
            sys.stdout.flush()
    except PuzzleError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"\nPeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
