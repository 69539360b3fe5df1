"""Time to read a library of finished artifacts from a bucket: one listing and all records.

    python -m benchmarks.store_listing --store s3://bucket/prefix --artifacts 1000

Missing artifacts are published first (each a record and a file of a few bytes; `make s3` starts a server). Then readers
read them, each in a new process with an empty local cache, like a new machine. Some read single records, and some read
the pack that a run writes. The target is under 2 s.
"""

import argparse
import concurrent.futures
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import ClassVar

from puzzle_core.records import Record, Work
from puzzle_core.report.report_tables import Table, format_text
from tasks.store.bucket import Bucket
from tasks.store.packs import PACKS
from tasks.store.store import Store

READ = """
import sys, time; from pathlib import Path; from tasks.store.store import Store
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


def drop_packs(url: str) -> None:
    """Remove every pack of this stage."""
    bucket = Bucket(url)
    bucket.remove(bucket.listing(f"{PACKS}/{ListedWork.stage}/"))


def read(url: str, cache: Path) -> tuple[int, float, float]:
    """Artifacts found, seconds of the listing, and of the records, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", READ, url, cache], capture_output=True, text=True, check=True)
    found, listing_s, records_s = done.stdout.split()
    return int(found), float(listing_s), float(records_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="s3://bucket/prefix; the environment says where and who")
    parser.add_argument("--artifacts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        store = Store(options.store, Path(place) / "publishing")
        there = store.keys("listed")
        missing = [n for n in range(options.artifacts) if ListedWork(number=n).key not in there]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: publish(store, number), missing))
        drop_packs(options.store)
        alone = [read(options.store, Path(place) / uuid.uuid4().hex) for _ in range(options.rounds)]
        store.pack(store.keys("listed"))
        packed = [read(options.store, Path(place) / uuid.uuid4().hex) for _ in range(options.rounds)]
        drop_packs(options.store)
    rows = []
    for name, runs in (("records one by one", alone), ("in a pack", packed)):
        listing_s, records_s = (statistics.median(run[i] for run in runs) for i in (1, 2))
        rows.append((name, runs[0][0], listing_s, records_s))
    table = Table(
        title=f"A whole library in {options.store}, read by machines that never saw it",
        columns=("reader", "artifacts", "listing, s", "records, s", "together, s"),
        rows=tuple((name, f"{n:,}", f"{a:.2f}", f"{b:.2f}", f"{a + b:.2f}") for name, n, a, b in rows),
        note=f"Medians of {options.rounds}. Listing: which artifacts are whole. Records: what each says, checked.",
    )
    sys.stdout.write(f"{format_text(table)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
