"""How long a library of whole artifacts in a bucket takes to be passed: one listing, and the records of all.

    python -m benchmarks.store_listing --store s3://bucket/prefix --artifacts 1000

The artifacts are published first where they are not there (each a record and a file of a few bytes; `make s3` starts a
server). Then three readers go through them, each in a process of its own: one with an empty local cache, and two that
find the records there. Wanted: under 2 s for the listing, and for all of it where the records were read before.
"""

import argparse
import concurrent.futures
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from puzzle_core.records import Record, Work
from puzzle_core.report.tables import Table, format_text
from tasks.store import Store

READ = """
import sys, time; from pathlib import Path; from tasks.store import Store
store = Store(sys.argv[1], Path(sys.argv[2]))
started = time.perf_counter(); keys = store.keys("listed"); listed = time.perf_counter()
found = store.manifests(keys); print(len(found), listed - started, time.perf_counter() - listed)
"""


class ListedWork(Work):
    """One small artifact."""

    stage: ClassVar[str] = "listed"
    version: ClassVar[int] = 1

    number: int


class ListedRecord(Record):
    """As much as a score says."""

    kl_nats_per_token: float
    losses: tuple[float, ...]


def publish(store: Store, number: int) -> None:
    """One artifact with a file, unless it is there."""
    work = ListedWork(number=number)
    with store.staging() as staged:
        (staged / "weights.safetensors").write_text(f"{number}")
        record = ListedRecord(kl_nats_per_token=0.1, losses=tuple(0.1 * step for step in range(20)))
        store.publish(work, record, staged, "a benchmark")


def read(url: str, cache: Path) -> tuple[int, float, float]:
    """Artifacts found, seconds of the listing, and of the records, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", READ, url, cache], capture_output=True, text=True, check=True)
    found, listing_s, records_s = done.stdout.split()
    return int(found), float(listing_s), float(records_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="s3://bucket/prefix; the environment says where and who")
    parser.add_argument("--artifacts", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        store = Store(options.store, Path(place) / "publishing")
        there = store.keys("listed")
        missing = [n for n in range(options.artifacts) if ListedWork(number=n).key not in there]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: publish(store, number), missing))
        first = read(options.store, Path(place) / "reading")
        again = [read(options.store, Path(place) / "reading") for _ in range(2)]
    rows = [("first on this machine", *first)]
    listing_s, records_s = (statistics.median(run[i] for run in again) for i in (1, 2))
    rows += [("again, median", again[0][0], listing_s, records_s)]
    table = Table(
        title=f"A library in {options.store}",
        columns=("reader", "artifacts", "listing, s", "records, s", "together, s"),
        rows=tuple((name, f"{n:,}", f"{a:.2f}", f"{b:.2f}", f"{a + b:.2f}") for name, n, a, b in rows),
        note="Listing: which artifacts are whole. Records: what each says (scores, losses), checked.",
    )
    sys.stdout.write(f"{format_text(table)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
