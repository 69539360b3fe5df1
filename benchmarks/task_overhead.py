"""Overhead of a Prefect task, and completeness of the server's task runs: trivial tasks on a local server.

    python -m benchmarks.task_overhead --tasks 1000 5000

Every round is one flow run that submits N parallel tasks, as the library and the scores do, on a new server on loopback
(SQLite). The targets are at most 6 ms per task of 1,000, and all rows of 5,000. `--plain` leaves the server's settings
at Prefect's defaults, for comparison.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from flows.services import prefect_server
from puzzle_core.report.report_tables import Table, format_text

LONGEST_SECONDS = 240.0


class Round(NamedTuple):
    """One flow run: tasks, seconds until the last was done, until no more rows appeared, and the rows."""

    tasks: int
    seconds: float
    lag_seconds: float
    visible: int


def submit_all(tasks: int) -> tuple[str, float]:
    """Run trivial tasks side by side in one flow: the flow run's id, and the seconds that they took."""
    from prefect import flow, task
    from prefect.runtime import flow_run

    from flows.task_runners.threads import CancellableThreadTaskRunner

    @task(persist_result=False)
    def trivial(number: int) -> int:
        return number

    @flow(task_runner=CancellableThreadTaskRunner(max_workers=2), persist_result=False)  # type: ignore[arg-type]
    def many() -> tuple[str, float]:
        started = time.perf_counter()
        futures = [trivial.submit(number) for number in range(tasks)]
        for future in futures:
            future.result()
        return str(flow_run.get_id()), time.perf_counter() - started

    return many()


def wait_for_rows(run: str, tasks: int) -> tuple[int, float]:
    """Completed task runs that the server shows of a flow run, and the seconds until there were no more to come."""
    from prefect.client.orchestration import get_client

    completed = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    started = changed = time.monotonic()
    visible = 0
    with get_client(sync_client=True) as client:
        while visible < tasks and time.monotonic() - changed < 30 and time.monotonic() - started < LONGEST_SECONDS:
            found = client.request("POST", "/task_runs/count", json=completed).json()
            if found != visible:
                visible, changed = found, time.monotonic()
            time.sleep(0.25)
    return visible, changed - started


def measure(counts: list[int]) -> list[Round]:
    """One round for every number of tasks."""
    rounds = []
    for tasks in counts:
        run, seconds = submit_all(tasks)
        visible, lag_seconds = wait_for_rows(run, tasks)
        rounds.append(Round(tasks, seconds, lag_seconds, visible))
    return rounds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1000, 5000], help="tasks of each round")
    parser.add_argument("--plain", action="store_true", help="the server's settings as Prefect has them")
    options = parser.parse_args()
    if options.plain:
        prefect_server.SETTINGS = {"PREFECT_LOGGING_SERVER_LEVEL": "WARNING"}
    os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
    with tempfile.TemporaryDirectory() as place, prefect_server.prefect_api(Path(place) / "prefect"):
        rounds = measure(options.tasks)
    rows = tuple(
        (
            f"{r.tasks:,}",
            f"{r.seconds:.2f}",
            f"{1000 * r.seconds / r.tasks:.1f}",
            f"{r.visible:,}",
            f"{r.lag_seconds:.1f}",
        )
        for r in rounds
    )
    columns = ("tasks", "seconds", "ms per task", "rows visible", "s until they were")
    title = f"Trivial tasks, {'plain' if options.plain else 'our'} server settings"
    sys.stdout.write(format_text(Table(title=title, columns=columns, rows=rows, text_columns=0)) + "\n")


if __name__ == "__main__":
    main()
