"""Leases over a bucket: one machine at a time, taken over from dead holders, and harmless where they cannot work."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from tasks.runtime import lease as lease_module
from tasks.runtime.lease import LeaseNote, lease
from tasks.runtime.process import this_process
from tasks.runtime.produce import produce
from tasks.store.bucket import Bucket
from tests.tasks.store.test_store import PlainRecord, PlainWork, publish

ROOT = Path(__file__).parents[3]
LONG_SECONDS = 120
FOREIGN = "another-host another-machine 1f2e4a7c pid:[4026531836] 4711 42"
"""The process of another machine, of which nothing is known here."""
WORK = PlainWork(number=3)
MACHINE = """
import sys
from tasks.runtime import lease
from tasks.store.bucket import Bucket

name, url, keys = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
lease.this_process = lambda: f"{name} machine boot pid:[1] 1 1"
lease.EXPIRY_SECONDS = float(sys.argv[4])
bucket = Bucket(url)
print("ready", flush=True)
for key in keys if sys.stdin.readline() else ():
    with lease.lease(bucket, key):
        if not bucket.exists(f"{key}/record.json"):
            print("at", key, flush=True)
            while key == "bld/v1/endless":
                sys.stdin.readline()
            bucket.put_new(f"{key}/record.json", name.encode())
print("done", flush=True)
"""


@contextlib.contextmanager
def machine(name, url, keys, expiry_s=60.0):
    """A process with the host name of another machine, which makes these artifacts once it is told to."""
    command = [sys.executable, "-c", MACHINE, name, url, ",".join(keys), str(expiry_s)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def memory():
    return Bucket(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def hurry(monkeypatch):
    """Leases that expire soon."""
    monkeypatch.setattr(lease_module, "EXPIRY_SECONDS", 0.3)


def leases(bucket):
    return sorted(bucket.listing("leases"))


def test_machines_that_start_together_make_nothing_twice(bucket):
    keys = [f"bld/v1/{number:02d}" for number in range(5)]
    with machine("one", bucket, keys) as one, machine("two", bucket, keys) as two:
        go(one)
        go(two)
        said = one.communicate()[0].splitlines() + two.communicate()[0].splitlines()
    assert sorted(line for line in said if line.startswith("at ")) == [f"at {key}" for key in keys]
    assert said.count("done") == 2
    assert leases(Bucket(bucket)) == []


def test_a_killed_machine_is_taken_over_once_its_lease_has_expired(bucket, hurry):
    key, opened = "bld/v1/endless", Bucket(bucket)
    with machine("other", bucket, [key], expiry_s=0.3) as other:
        go(other)
        assert other.stdout.readline() == f"at {key}\n"
        got = threading.Event()

        def wait_for_it():
            with lease(opened, key):
                got.set()

        waiting = threading.Thread(target=wait_for_it, daemon=True)
        waiting.start()
        first = opened.read_all(leases(opened))
        while (now := opened.read_all(leases(opened))) == first:  # it renews its lease
            assert not got.is_set()
        assert json.loads(now[f"leases/{key}/0"])["renewal"] > 0
        assert not got.is_set()
        other.send_signal(signal.SIGKILL)
        assert got.wait(LONG_SECONDS)
        waiting.join()
    assert leases(opened) == []


@pytest.mark.parametrize("waiters", [1, 5])
def test_one_waiter_takes_over_from_a_machine_that_has_gone(memory, hurry, waiters):
    memory.put_new("leases/a/v1/b/0", LeaseNote(holder=FOREIGN, token="x").text())
    inside, most = [], []

    def take():
        with lease(memory, "a/v1/b"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=take) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (waiters, 1)
    assert leases(memory) == []


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(memory, caplog):
    *same, _pid, ticks = this_process().split()
    gone = " ".join([*same, "4194305", ticks])  # no process has this id
    memory.put_new("leases/a/v1/b/0", LeaseNote(holder=gone, token="x").text())
    with caplog.at_level("INFO"), lease(memory, "a/v1/b"):
        assert leases(memory) == ["leases/a/v1/b/0", "leases/a/v1/b/1"]
    assert "taking over the work of a process that has ended: a/v1/b" in caplog.text


def test_a_holder_that_was_taken_over_says_so_and_leaves_the_lease_to_the_other(memory, hurry, caplog):
    other = LeaseNote(holder=FOREIGN, token="x").text()
    with lease(memory, "a/v1/b"):
        memory.put_new("leases/a/v1/b/1", other)
        while "was lost" not in caplog.text:
            assert threading.active_count() > 1
    assert memory.read_all(leases(memory)) == {"leases/a/v1/b/1": other}


def test_a_server_that_overwrites_is_told_once_and_nobody_waits(memory, monkeypatch, caplog):
    monkeypatch.setattr(Bucket, "put_new", lambda bucket, path, data: bucket.write(path, data) or True)
    for _ in range(2):
        with lease(memory, "a/v1/b"), lease(memory, "a/v1/b"):
            assert leases(memory) == []
    assert caplog.text.count("ignores If-None-Match") == 1


def test_what_another_machine_makes_meanwhile_is_not_made_again(context_of):
    context = context_of(store=f"memory://{uuid.uuid4().hex}")
    store, made = context.store(), []
    path = f"leases/{WORK.key}/0"
    store.bucket.put_new(path, LeaseNote(holder=FOREIGN, token="x").text())
    waiting = threading.Thread(target=lambda: made.append(produce(WORK, context, lambda _: pytest.fail("made again"))))
    waiting.start()
    publish(store, WORK)
    store.bucket.remove([path])
    waiting.join()
    assert made == [WORK.key]
    assert produce(PlainWork(number=4), context, lambda _: PlainRecord())
    assert leases(store.bucket) == []
