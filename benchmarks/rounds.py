"""Interleaved timing: every round runs all contestants in rotating order, so machine drift affects all of them.

The result has wall time and the CPU time of the process, which depends less on other work on the machine.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from puzzle_core.report.report_tables import Table


class Times(NamedTuple):
    """Seconds of one contestant, one entry per round."""

    wall_s: list[float]
    cpu_s: list[float]


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Time all contestants in `rounds` rounds; a warm-up round goes before and is not counted."""
    names, times = list(contestants), {name: Times([], []) for name in contestants}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            wall, cpu = time.perf_counter(), time.process_time()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].wall_s.append(time.perf_counter() - wall)
                times[name].cpu_s.append(time.process_time() - cpu)
    return times


def ratio(numerators: list[float], denominators: list[float]) -> str:
    """The median over rounds of a quotient within each round, and in brackets its least and largest value."""
    quotients = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"{statistics.median(quotients):.3f} [{min(quotients):.3f}, {max(quotients):.3f}]"


def throughput_table(
    title: str, tokens: int, times: Mapping[str, Times], ends: Mapping[str, Mapping[str, torch.Tensor]]
) -> Table:
    """Speed of trainings beside that of the first contestant, and how far the weights that they end at differ.

    Args:
        title: of the table.
        tokens: that each contestant trains on in a round.
        times: by contestant, as `take_turns` gives them.
        ends: by contestant, the weights at the end.
    """
    first = next(iter(times))
    reference = ends[first]
    rows = [
        (
            name,
            f"{tokens / statistics.median(took.wall_s):,.0f}",
            ratio(times[first].wall_s, took.wall_s),
            ratio(times[first].cpu_s, took.cpu_s),
            f"{max(float((ends[name][n] - reference[n]).abs().max()) for n in reference):.1e}",
        )
        for name, took in times.items()
    ]
    columns = ("", "tok/s, median", "speed ratio [least, most]", "the same in CPU time", "largest weight difference")
    return Table(title=title, columns=columns, rows=tuple(rows))
