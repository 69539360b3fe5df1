"""The table of faults: injects every fault and reports the outcome in the run, the store, Prefect and MLflow.

    python -m benchmarks.faults                                 all of them: some minutes
    python -m benchmarks.faults --only "kill -9|disk"           those whose name has a match
    python -m benchmarks.faults --write docs/faults.md          puts the table between its marks

The faults are the tests marked `fault`, run one after another. The test checks every statement of its row. The
requirements are those of the tests: an S3 server (Ceph's gateway for real refusals), root for a small disk, and
libfaketime.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PLACES = [
    "tests/e2e/test_killed.py",
    "tests/e2e/test_faults.py",
    "tests/e2e/test_s3.py",
    "tests/e2e/test_deploy.py",
    "tests/flows/test_permissions.py",
    "tests/flows/services/test_orphaned_runs.py",
    "tests/flows/services/test_dead_runs.py",
    "tests/tasks/store/test_store_s3.py",
    "tests/flows/task_runners/test_dask_cluster.py",
]
COLUMNS = ("fault", "how it was injected", "the run", "finished work, nothing half-written", "Prefect and MLflow", "s")
MARKS = ("<!-- faults -->", "<!-- end of faults -->")


class Rows:
    """A plugin of pytest's: keeps to tests that are marked, and makes a row of each."""

    def __init__(self, only: str):
        self.only, self.named = only, dict[str, tuple[str, str]]()
        self.rows, self.failed = list[tuple[str, ...]](), 0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Name the faults, and leave out all other tests."""
        for item in items:
            if mark := item.get_closest_marker("fault"):
                values = item.callspec.params | {"id": item.callspec.id} if hasattr(item, "callspec") else {}
                what, how = (text.format(**values) for text in mark.args)
                if re.search(self.only, what):
                    self.named[item.nodeid] = (what, how)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.named])
        items[:] = [item for item in items if item.nodeid in self.named]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One row for each test, once it ran, or could not."""
        if report.when != "call" and report.passed:
            return
        said = dict(report.user_properties)
        cells = tuple(str(said.get(column, "")) for column in ("run", "store", "shown"))
        if report.skipped:
            cells = (f"not injected: {report.longrepr[2].removeprefix('Skipped: ')}", "", "")
        elif report.failed:
            self.failed += 1
            cells = (f"**FAILED**: {report.longrepr.reprcrash.message.splitlines()[0]}", "", "")
        self.rows.append((*self.named[report.nodeid], *cells, f"{report.duration:.0f}"))
        sys.stderr.write(f"{len(self.rows)} of {len(self.named)}: {self.rows[-1][0]}: {cells[0]}\n")


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table as pages have it."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="only faults whose name has a match")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    options = parser.parse_args()
    plugin = Rows(options.only)
    quiet = ["-qq", "-m", "fault", "-p", "no:terminalreporter", "-p", "no:randomly", "--rootdir", str(ROOT)]
    pytest.main([*quiet, *(str(ROOT / place) for place in PLACES)], plugins=[plugin])
    table = markdown(plugin.rows)
    sys.stdout.write(table)
    if options.write:
        start, end = MARKS
        before, rest = options.write.read_text().split(start)
        options.write.write_text(f"{before}{start}\n{table}{end}{rest.split(end)[1]}")
    return 1 if plugin.failed or not plugin.rows else 0


if __name__ == "__main__":
    sys.exit(main())
