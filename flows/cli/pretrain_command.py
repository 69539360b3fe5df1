"""`puzzle pretrain-example`: the quickstart's parent, trained again."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt


def pretrain_example(
    *,
    out: Annotated[Path, Parameter(metavar="DIR", help="Directory of the parent.")] = Path(
        "deployments/parents/stdlib-2m"
    ),
    steps: Annotated[PositiveInt, Parameter(help="Optimizer steps.")] = 6000,
    processes: Annotated[PositiveInt | None, Parameter(help="Processes side by side [default: one per core].")] = None,
) -> None:
    """Train the quickstart's parent on Python's standard library."""
    from puzzle_core.device import available_cores
    from puzzle_core.example_parent import PretrainSpec, pretrain

    record = pretrain(out, PretrainSpec(steps=steps), processes or available_cores())
    sys.stdout.write(f"{out}: {record['held_out']}\n")
