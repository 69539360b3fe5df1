"""Overhead of the workflow: wall time of a whole `puzzle run` against the seconds inside its tasks.

The command runs twice in a process of its own, with a fresh store, Prefect server and MLflow database; the start and
end of every task run and flow run are then read from the server's data that the command leaves behind.

Work is the time in the bodies of tasks that compute something, reading their inputs and publishing their artifacts
included, from Running to Completed. Tasks that are submitted to run side by side (BLD with its captures, scores,
evaluations) count their seconds divided by the number of workers, as if no worker ever waited; all others count whole.
Everything else is overhead: Prefect's own bookkeeping, workers that have nothing to do, opening the inputs, checking
limits, dropping activations, MLflow records. The overhead is given for the flow alone (from the start of the flow run
to its end) and for the whole command, which also imports torch and Prefect, and starts and stops the server (issue: at
most 10 % where the work is 5 minutes or more).

Contention between threads of one process is inside the task bodies, so it counts as work here. Compare with `--set
runtime.workers=1` to see it.
"""

import argparse
import datetime
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.puzzle_run import REPOSITORY, run_puzzle
from flows.cli.main import PREFECT_HOME
from puzzle_core.errors import PuzzleError
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.spec_file import load_spec

SIDE_BY_SIDE = {
    "train-variants": ("bld ", "capture "),
    "score-variants": ("score ",),
    "evaluate-models": ("evaluate ",),
}
"""By flow, how the names of the tasks begin that it submits to its workers."""
BOOKKEEPING = ("open inputs", "check limits", "drop activations")
PAGE = 200


class Ran(NamedTuple):
    """One flow run with the task runs that are its own."""

    name: str
    started: datetime.datetime
    seconds: float
    tasks: list[Any]


def read_runs(place: Path) -> list[Ran]:
    """All flow runs that the server in `place` knows, by time; fetched from its API."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.services.prefect_server import free_port, own_server

    task_runs: list[Any] = []
    with (
        own_server(place / PREFECT_HOME, free_port()) as url,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        names = {flow.id: flow.name for flow in client.read_flows()}
        flow_runs = client.read_flow_runs()
        while len(page := client.read_task_runs(offset=len(task_runs), limit=PAGE)) == PAGE:
            task_runs += page
        task_runs += page
    tasks, inner_flows = defaultdict(list), {run.parent_task_run_id for run in flow_runs}
    for task_run in task_runs:
        if task_run.id not in inner_flows:  # Prefect shows an inner flow as a task of the outer one, too
            tasks[task_run.flow_run_id].append(task_run)
    ran = [Ran(names[run.flow_id], run.start_time, seconds(run), tasks[run.id]) for run in flow_runs]
    return sorted(ran, key=lambda run: run.started)


def seconds(run: Any) -> float:
    """From Running to the end; nothing for a task that was answered from the cache."""
    return (run.end_time - run.start_time).total_seconds() if run.start_time and run.end_time else 0.0


def is_side_by_side(flow: str, task: Any) -> bool:
    """Whether this flow submits this task to its workers."""
    return task.name.startswith(SIDE_BY_SIDE.get(flow, ()))


def work_seconds(ran: Ran, workers: int) -> float:
    """What the flow run's own tasks take on workers that never wait."""
    works = [task for task in ran.tasks if not task.name.startswith(BOOKKEEPING)]
    return sum(seconds(task) / (workers if is_side_by_side(ran.name, task) else 1) for task in works)


def flows_table(runs: list[Ran], workers: int) -> Table:
    """Where the time goes, flow by flow; the first flow holds all the others."""
    rows = [
        (
            run.name,
            str(len(run.tasks)),
            f"{run.seconds:.1f}",
            f"{sum(map(seconds, run.tasks)):.1f}",
            f"{work_seconds(run, workers):.1f}",
        )
        for run in runs
    ]
    return Table(
        title=f"Flow runs, {workers} workers",
        columns=("flow", "own tasks", "wall, s", "in tasks, s", "work, s"),
        rows=tuple(rows),
        note="Wall time holds that of inner flows; tasks and work are the flow's own.",
    )


def overhead_table(command_s: float, flow_s: float, work_s: float, cached_s: float, recomputed: list[str]) -> Table:
    """The answer."""
    rows = (
        ("work", f"{work_s:.1f}", ""),
        ("flow", f"{flow_s:.1f}", f"{flow_s / work_s - 1:+.1%}"),
        ("command", f"{command_s:.1f}", f"{command_s / work_s - 1:+.1%}"),
        ("the same command again, all cached", f"{cached_s:.1f}", ""),
    )
    note = f"Work that the second command did: {', '.join(recomputed) or 'none'}."
    return Table(title="Overhead over the work", columns=("", "s", "over the work"), rows=rows, note=note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, nargs="?", default=REPOSITORY / "deployments/specs/quickstart.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    spec = load_spec(options.spec, tuple(options.overrides))
    with tempfile.TemporaryDirectory() as place:
        try:
            command_s = run_puzzle(options.spec, options.overrides, Path(place))
            cached_s = run_puzzle(options.spec, options.overrides, Path(place))
            runs = read_runs(Path(place))
        except PuzzleError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    from tasks.runtime.context import RunContext

    workers = RunContext.of(spec).workers
    starts = [number for number, run in enumerate(runs) if run.name == "puzzle"]
    first, second = runs[: starts[1]], runs[starts[1] :]
    work_s = sum(work_seconds(run, workers) for run in first)
    ran_again = [task.name for run in second for task in run.tasks if task.state_name != "Cached"]
    recomputed = sorted(name for name in ran_again if not name.startswith(BOOKKEEPING))
    sys.stdout.write(f"{format_text(flows_table(first, workers))}\n\n")
    table = overhead_table(command_s, first[0].seconds, work_s, cached_s, recomputed)
    sys.stdout.write(f"{format_text(table)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
