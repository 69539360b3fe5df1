"""Whole runs under faults: killed processes, stores and servers that fail, full disks, clocks that jump, two at once.

Faults of a training that is killed are in test_killed.py, those of the store alone in tasks/test_store_s3.py.
"""

import contextlib
import contextvars
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.build_library import build_library
from flows.services import orphaned_runs
from flows.services.prefect_server import free_port, own_server, server_command
from puzzle_core.errors import PuzzleError
from tasks.runtime.context import RunContext
from tasks.store.store import MANIFEST
from tests.faults import ends, kept_open, kill_when, shown_running, start, wait_until
from tests.workflow import SCORED, TRAINED, artifacts, check_whole, merged, of_stage, write_spec

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture
def named(spec_of, request):
    """A spec whose runs are told from others by their name in Prefect and by their experiment in MLflow."""
    name = re.sub(r"\W+", "-", request.node.name)[:60]

    def make(**changes):
        return spec_of(**merged({"name": name, "runtime": {"mlflow_experiment": name}}, changes))

    return make


def records(store):
    """When the record of each artifact of a bucket was written, by key."""
    found = store.listing()
    return {path.removesuffix(f"/{MANIFEST}"): entry.modified_s for path, entry in found.items()
            if path.endswith(f"/{MANIFEST}")}  # fmt: skip


def counts(keys):
    return {stage: len(of_stage(keys, stage)) for stage in ("bld", "score")}


WHOLE = {"bld": TRAINED, "score": SCORED}


@pytest.mark.fault("kill -9 during scoring", "SIGKILL to `puzzle build-library` once a first score is there")
def test_killed_during_scoring(named, prefect_server, tmp_path, next_command, outcome):
    spec = named()
    store, file = spec.runtime.store, write_spec(spec, tmp_path / "spec.yaml")
    running = start(tmp_path / "first", "build-library", file, PREFECT_API_URL=prefect_server)
    kill_when(running, lambda: of_stage(artifacts(store), "score"), tmp_path / "first")
    before = artifacts(store)
    check_whole(store, tmp_path / "unused")
    assert 0 < counts(before)["score"] < SCORED
    assert shown_running(spec, 0)
    next_command("build-library", file)
    after = artifacts(store)
    assert {key: after[key] for key in before} == before
    assert counts(after) == WHOLE
    check_whole(store, tmp_path / "unused")
    assert shown_running(spec) == []
    assert ends(spec) == {"Prefect": ["Crashed", "Completed"], "MLflow": ["KILLED", "FINISHED"]}
    outcome(
        run=f"the next one makes the other {len(after) - len(before)} and ends right",
        store=f"{len(before)} of {len(before)} finished artifacts kept and not made again, none half-written",
        shown="Crashed and KILLED by the next command; none open",
    )


@pytest.mark.long
@pytest.mark.fault("kill -9 during an upload to S3", "SIGKILL to `puzzle build-library` while a PUT of a block hangs")
def test_killed_during_an_upload(named, bucket, proxy, prefect_server, tmp_path, next_command, outcome):
    spec = named(runtime={"store": bucket})
    store, file = RunContext.of(spec).store(), write_spec(spec, tmp_path / "spec.yaml")
    uploads = [proxy.inject("stall", matches=is_upload("bld", number)) for number in range(3, 6)]
    running = start(tmp_path / "first", "build-library", file, PREFECT_API_URL=prefect_server)
    kill_when(running, lambda: any(fault.done for fault in uploads), tmp_path / "first")
    proxy.faults.clear()
    before = records(store)
    assert 0 < counts(before)["bld"] < TRAINED
    assert {key: store.damage(key) for key in before if store.damage(key)} == {}
    next_command("build-library", file)
    after = records(store)
    assert {key: after[key] for key in before} == before
    assert counts(after) == WHOLE
    assert {key: store.damage(key) for key in after if store.damage(key)} == {}
    assert shown_running(spec) == []
    assert ends(spec) == {"Prefect": ["Crashed", "Completed"], "MLflow": ["KILLED", "FINISHED"]}
    outcome(
        run=f"the next one makes the other {len(after) - len(before)} and ends right",
        store=f"{len(before)} of {len(before)} finished artifacts kept and not made again; all {len(after)} whole",
        shown="Crashed and KILLED by the next command; none open",
    )


def is_upload(stage, least=0):
    """Matches uploads of a stage's files, once so many of them went through."""
    seen = []

    def matches(request):
        if request.method == "PUT" and f"/{stage}/" in request.path and request.path.endswith(".safetensors"):
            seen.append(request.path)
            return len(seen) > least
        return False

    return matches


HARMS = {"500": "bld", "503 SlowDown": "bld", "reset": "score", "cut": "score", "stall": "importance"}


@pytest.mark.long
@pytest.mark.fault("the store fails during a run", "proxy before S3: 500, 503, resets, cut answers, a stall, 17 in all")
def test_a_store_that_fails_for_a_while_during_a_run(named, bucket, proxy, prefect_server, outcome):
    spec = named(runtime={"store": bucket})
    faults = [
        proxy.inject(
            harm, times=1 if harm == "stall" else 4, matches=lambda request, of=f"/{stage}/": of in request.path
        )
        for harm, stage in HARMS.items()
    ]
    build_library(spec)
    assert [fault.done for fault in faults] == [4, 4, 4, 4, 1]
    store = RunContext.of(spec).store()
    keys = store.keys()
    assert counts(keys) == WHOLE
    assert {key: store.damage(key) for key in keys if store.damage(key)} == {}
    assert shown_running(spec) == []
    assert ends(spec) == {"Prefect": ["Completed"], "MLflow": ["FINISHED"]}
    outcome(
        run="waits, asks again and ends right",
        store=f"every byte of {len(keys)} artifacts read",
        shown="none open",
    )


@pytest.mark.fault("credentials expire during a run", "proxy before S3: ExpiredToken as of the first score")
def test_credentials_that_expire_during_a_run(named, bucket, proxy, prefect_server, outcome):
    spec = named(runtime={"store": bucket})
    proxy.inject("400 ExpiredToken", times=10**6, matches=lambda r: proxy.count("PUT", "/score/") > 0)
    with pytest.raises(PuzzleError, match=r"these credentials have expired: renew them \(ExpiredToken\)"):
        build_library(spec)
    proxy.faults.clear()
    store = RunContext.of(spec).store()
    before = records(store)
    assert counts(before) == {"bld": TRAINED, "score": 0}
    assert shown_running(spec) == []
    build_library(spec)
    after = records(store)
    assert {key: after[key] for key in before} == before
    assert counts(after) == WHOLE
    assert ends(spec) == {"Prefect": ["Failed", "Completed"], "MLflow": ["FAILED", "FINISHED"]}
    outcome(
        run="says why not (renew them); once renewed the next one ends right",
        store=f"{len(before)} of {len(before)} finished artifacts kept and not made again, none half-written",
        shown="Failed and FAILED; none open",
    )


@pytest.mark.fault("the store's disk is full", "a tmpfs that another file fills up once a block is there: real ENOSPC")
def test_a_disk_that_fills_up_during_a_run(named, small_disk, prefect_server, tmp_path, outcome):
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    spec = named(runtime={"store": str(small_disk / "store")}, bld={"epochs": 5})
    filler = small_disk / "filler"

    def fill():
        while not of_stage(artifacts(spec.runtime.store), "bld"):
            time.sleep(0.001)
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"0" * 4096)
                file.flush()

    other = threading.Thread(target=fill)
    other.start()
    with pytest.raises(PuzzleError, match=r"cannot write to .*No space left on device; free some space"):
        build_library(spec)
    other.join()
    before = artifacts(spec.runtime.store)
    check_whole(spec.runtime.store, tmp_path / "unused")
    assert 0 < counts(before)["bld"] < TRAINED
    assert not list((small_disk / "store" / ".staging").glob("*"))
    filler.unlink()
    build_library(spec)
    after = artifacts(spec.runtime.store)
    assert {key: after[key] for key in before} == before
    assert counts(after) == WHOLE
    assert shown_running(spec) == []
    assert ends(spec) == {"Prefect": ["Failed", "Completed"], "MLflow": ["FAILED", "FINISHED"]}
    outcome(
        run="says why not (which disk, free some space); with room the next one ends right",
        store=f"{len(before)} of {len(before)} finished artifacts kept and not made again, none half-written",
        shown="Failed and FAILED; none open",
    )


@pytest.mark.long
@pytest.mark.fault("the Prefect server restarts during a run", "SIGKILL to the server once a block is there, 3 s none")
def test_the_prefect_server_restarts_during_a_run(named, tmp_path, outcome):
    spec, home, port = named(bld={"epochs": 40}), tmp_path / "prefect", free_port()
    failed = []

    def run():
        try:
            build_library(spec)
        except BaseException as error:
            failed.append(error)

    with own_server(home, port) as url, temporary_settings({PREFECT_API_URL: url}):
        running = threading.Thread(target=contextvars.copy_context().run, args=(run,))
        running.start()
        while running.is_alive() and not of_stage(artifacts(spec.runtime.store), "bld"):
            time.sleep(0.01)
        assert running.is_alive()
        (killed,) = [pid for pid in children() if f"--port {port}" in pid[1]]
        os.kill(killed[0], signal.SIGKILL)
        done = counts(artifacts(spec.runtime.store))
        time.sleep(3)
        with serving(home, port):
            running.join()
            assert failed == []
            assert shown_running(spec) == []
            assert ends(spec) == {"Prefect": ["Completed"], "MLflow": ["FINISHED"]}
    assert done != WHOLE
    assert counts(artifacts(spec.runtime.store)) == WHOLE
    check_whole(spec.runtime.store, tmp_path / "unused")
    outcome(
        run="goes on, waits where it must tell the server, and ends right",
        store=f"{len(artifacts(spec.runtime.store))} artifacts, all whole",
        shown="all of them ended; none open",
    )


def children():
    """Ids and command lines of what this process started."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        found.append((int(pid), command))
    return found


@contextlib.contextmanager
def serving(home: Path, port: int) -> Iterator[None]:
    """The same server once more, over the same data."""
    command, environment = server_command(home, port)
    with (home / "server.log").open("ab") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.fault(
    "two runs of one spec at once", "two `puzzle build-library` in one new directory, servers of their own"
)
def test_two_runs_of_one_spec_at_once(content, tmp_path, outcome):
    values = {name: part for name, part in content.items() if name != "runtime"}
    file = write_spec(merged(values, {"runtime": {"workers": 2}}), tmp_path / "spec.yaml")
    (tmp_path / ".puzzle").mkdir()
    both = [tmp_path / "one", tmp_path / "two"]
    for place in both:
        place.mkdir()
        (place / ".puzzle").symlink_to(tmp_path / ".puzzle")
    runs = [start(place, "build-library", file, PREFECT_API_URL="") for place in both]
    codes = [run.wait() for run in runs]
    said = [(place / "stderr").read_text() for place in both]
    assert codes == [0, 0], "\n".join(said)
    assert "Traceback" not in "".join(said)
    store = tmp_path / ".puzzle/store"
    assert counts(artifacts(store)) == WHOLE
    check_whole(store, tmp_path / "unused")
    trained = [[int(n) for n in re.findall(r"in the store, (\d+) to (?:train|score)", text)] for text in said]
    assert [sum(numbers) for numbers in zip(*trained, strict=True)] == [TRAINED, SCORED]
    assert kept_open(tmp_path) == {"flow_run": 0, "task_run": 0, "runs": 0}
    outcome(
        run="both end right; one waits for what the other is at",
        store=f"{len(artifacts(store))} artifacts, all whole; {TRAINED} trainings and {SCORED} scores, none twice",
        shown="none open",
    )


@pytest.mark.long
@pytest.mark.fault(
    "the clock jumps during a run", "libfaketime: 400 days on and then 800 back, as the library is built"
)
def test_a_clock_that_jumps(named, prefect_server, tmp_path, next_command, outcome, monkeypatch):
    if FAKETIME is None:
        pytest.skip("no libfaketime: apt-get install libfaketime")
    spec = named(bld={"epochs": 20})
    store, file, clock = spec.runtime.store, write_spec(spec, tmp_path / "spec.yaml"), tmp_path / "clock"
    clock.write_text("+0d\n")
    environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1"}
    environment |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "PREFECT_API_URL": prefect_server}
    running = start(tmp_path / "first", "build-library", file, **environment)
    for seen, jump in ((1, "+400d\n"), (2, "-400d\n"), (3, "-400d\n")):
        wait_until(
            lambda seen=seen: len(years(store)) == seen and of_stage(artifacts(store), "bld"),
            running,
            tmp_path / "first",
        )
        clock.write_text(jump)
    assert running.wait() == 0, (tmp_path / "first" / "stderr").read_text()
    before = artifacts(store)
    assert counts(before) == WHOLE
    check_whole(store, tmp_path / "unused")
    monkeypatch.setattr(orphaned_runs, "NOTING_SECONDS", 1.0)
    time.sleep(2)
    next_command("build-library", file)
    assert artifacts(store) == before
    assert shown_running(spec) == []
    assert ends(spec)["Prefect"] == ["Completed", "Completed"]
    assert set(ends(spec)["MLflow"]) == {"FINISHED"}
    outcome(
        run="ends right; the next one, at the right time, finds all of it and computes nothing",
        store=f"{len(before)} artifacts, all whole, made in {', '.join(sorted(years(store)))}",
        shown="tasks that ended before they began are closed by the next command; none open",
    )


def years(store):
    """The years in which artifacts say they were made."""
    return {json.loads((Path(store) / key / MANIFEST).read_text())["made_at"][:4] for key in artifacts(store)}
