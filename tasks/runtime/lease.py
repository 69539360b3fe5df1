"""Leases: of all machines that share a bucket, one at a time makes an artifact.

A lease is an object `leases/KEY/0` of the bucket, created only if there is none (If-None-Match). Its holder writes it
again every few seconds. A waiter that sees it unchanged for EXPIRY_SECONDS, by its own clock alone, takes over: it
creates `leases/KEY/1`, which one waiter can do, and so on. The highest number holds. Clocks of machines are never
compared.

A lease saves work, and correctness does not hang on it: two machines that make the same artifact write the same one,
and the first record stays. So nothing fails where a lease is lost, or where the server ignores If-None-Match.
"""

import contextlib
import logging
import random
import threading
import time
import uuid
from collections.abc import Iterator

from puzzle_core.errors import StorageError
from puzzle_core.records import Record
from tasks.runtime.process import is_gone, this_process
from tasks.store.bucket import Bucket, FileStatus

log = logging.getLogger("puzzle")
LEASES = "leases"
EXPIRY_SECONDS = 60.0
RENEWALS = 4
"""Renewals within EXPIRY_SECONDS."""
LONGEST_POLL_SECONDS = 2.0
_without: set[str] = set()  # stores whose server ignores If-None-Match
_checking = threading.Lock()
_checked: set[str] = set()


class LeaseNote(Record):
    """What the object of a lease says: its holder's process, a token of its own, and how often it was renewed."""

    holder: str
    token: str
    renewal: int = 0

    def text(self) -> bytes:
        """The object's content."""
        return self.canonical_json().encode()


@contextlib.contextmanager
def lease(bucket: Bucket, key: str) -> Iterator[None]:
    """Wait until no other machine makes the artifact of `key`, and hold its lease.

    Raises:
        StorageError: the bucket refuses, or gives no good answer.
    """
    note = LeaseNote(holder=this_process(), token=uuid.uuid4().hex)
    number = _take(bucket, key, note)
    if not _excludes(bucket, _path(key, number)):
        yield
        return
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(bucket, key, number, note, over), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()  # else a renewal under way would write the object again
        try:
            bucket.remove(_path(key, earlier) for earlier in range(number, -1, -1))
        except StorageError as error:
            log.warning("%s: the lease of %s stays until it expires: %s", bucket.url, key, error)


def _take(bucket: Bucket, key: str, note: LeaseNote) -> int:
    """Wait for the lease, and return the number of the object that holds it."""
    if bucket.url in _without or _create(bucket, key, 0, note):
        return 0
    seen: tuple[int, FileStatus] | None = None
    holder, delay_s, unchanged_s, looked_at_s = "", 0.1, 0.0, time.monotonic()
    while True:
        found, now_s = _highest(bucket, key), time.monotonic()
        if found is None:
            if _create(bucket, key, 0, note):
                return 0
        else:
            if seen is None or seen[0] != found[0]:
                holder = _holder(bucket, key, found[0])
                log.info("waiting for another machine that is at the same work: %s (%s)", key, holder or "unknown")
            # a long time without an answer says nothing of the holder
            unchanged_s += min(now_s - looked_at_s, 2 * LONGEST_POLL_SECONDS) if found == seen else -unchanged_s
            expired = unchanged_s >= EXPIRY_SECONDS or is_gone(holder)
            if expired and _create(bucket, key, found[0] + 1, note):
                log.info("taking over the work of a process that has ended: %s (%s)", key, holder or "unknown")
                return found[0] + 1
        seen, looked_at_s = found, now_s
        time.sleep(min(delay_s, EXPIRY_SECONDS / RENEWALS) * random.uniform(0.5, 1))
        delay_s = min(2 * delay_s, LONGEST_POLL_SECONDS)


def _path(key: str, number: int) -> str:
    return f"{LEASES}/{key}/{number}"


def _create(bucket: Bucket, key: str, number: int, note: LeaseNote) -> bool:
    """Create a lease's object; also true where a request that seemed to fail has created it."""
    path = _path(key, number)
    return bucket.put_new(path, note.text()) or bucket.read_all([path]).get(path) == note.text()


def _highest(bucket: Bucket, key: str) -> tuple[int, FileStatus] | None:
    """The number and the status of the object that holds a lease; none where there is none."""
    numbers = {path.rpartition("/")[2]: status for path, status in bucket.listing(f"{LEASES}/{key}/").items()}
    return max(((int(number), status) for number, status in numbers.items() if number.isdigit()), default=None)


def _holder(bucket: Bucket, key: str, number: int) -> str:
    """The process that holds a lease, by its own word; empty where the object is gone or damaged."""
    path = _path(key, number)
    with contextlib.suppress(ValueError):
        return LeaseNote.model_validate_json(bucket.read_all([path]).get(path, b"")).holder
    return ""


def _excludes(bucket: Bucket, path: str) -> bool:
    """Whether the server refuses to create an object that exists, as this one does; asked once per process.

    On a server that overwrites it, leases exclude nobody, and are left out from then on.
    """
    with _checking:
        if bucket.url not in _checked:
            if bucket.put_new(path, b"{}"):
                bucket.remove([path])
                _without.add(bucket.url)
                log.warning(
                    "%s ignores If-None-Match: machines that share it cannot see each other's work, and may do some of "
                    "it twice; results are right all the same",
                    bucket.url,
                )
            _checked.add(bucket.url)
        return bucket.url not in _without


def _renew(bucket: Bucket, key: str, number: int, note: LeaseNote, over: threading.Event) -> None:
    """Write a lease's object again and again, until `over` is set or another machine has taken over."""
    renewal = 0
    while not over.wait(EXPIRY_SECONDS / RENEWALS):
        renewal += 1
        try:
            found = _highest(bucket, key)
            if found is None or found[0] != number:
                log.warning("%s: the lease of %s was lost: another machine may make the same artifact", bucket.url, key)
                return
            bucket.write(_path(key, number), note.model_copy(update={"renewal": renewal}).text())
        except StorageError as error:
            log.warning("%s: the lease of %s could not be renewed: %s", bucket.url, key, error)
