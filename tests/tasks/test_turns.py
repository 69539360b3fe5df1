"""Turns on one machine: side by side, alone, never starved, and free again after kill -9."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.stages import find_costs
from tasks.turns import claim, place, turn
from tests.workflow import artifacts, plan_of

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from tasks.turns import turn

with turn(sys.argv[1] == "alone"):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Locks of this test only."""
    monkeypatch.setenv("PUZZLE_TURNS", str(tmp_path / "turns"))


@pytest.fixture
def hold():
    """Hold a turn in a process of its own."""
    started = []

    def begin(how):
        process = subprocess.Popen([sys.executable, "-c", HOLD, how], cwd=ROOT, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"in\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class Task(threading.Thread):
    """A task that takes its turn, until it is let go."""

    def __init__(self, alone):
        super().__init__(daemon=True)
        self.alone, self.inside, self.leave = alone, threading.Event(), threading.Event()
        self.start()

    def run(self):
        with turn(self.alone):
            self.inside.set()
            self.leave.wait(30)

    def gets_in(self, within=5.0):
        return self.inside.wait(within)


def test_others_run_side_by_side_and_a_measurement_alone(hold):
    held = hold("beside")
    beside, alone = Task(False), None
    assert beside.gets_in()
    alone = Task(True)
    assert not alone.gets_in(0.4)
    beside.leave.set()
    assert not alone.gets_in(0.4)
    held.send_signal(signal.SIGKILL)
    assert alone.gets_in()
    after = Task(False)
    assert not after.gets_in(0.4)
    alone.leave.set()
    assert after.gets_in()
    after.leave.set()


def test_a_killed_measurement_leaves_no_lock(hold):
    measuring = hold("alone")
    waiting = Task(False)
    assert not waiting.gets_in(0.4)
    measuring.send_signal(signal.SIGKILL)
    assert waiting.gets_in(2)
    waiting.leave.set()


def test_what_comes_later_waits_behind_a_measurement():
    first = Task(False)
    assert first.gets_in()
    alone = Task(True)
    time.sleep(0.3)
    later = Task(False)
    assert not later.gets_in(0.4)
    first.leave.set()
    assert alone.gets_in()
    assert not later.inside.is_set()
    alone.leave.set()
    assert later.gets_in()
    later.leave.set()


def test_a_turn_ends_with_an_error():
    with pytest.raises(KeyError), turn(alone=True):
        raise KeyError
    with turn(alone=True):
        pass


def test_costs_are_measured_alone_and_looked_up_at_once(spec_of, tmp_path):
    plan, site = plan_of(spec_of())
    (work,) = plan.costs().values()
    other = Task(False)
    assert other.gets_in()
    measuring = threading.Thread(target=find_costs.fn, args=(work, site), daemon=True)
    measuring.start()
    measuring.join(1)
    assert artifacts(tmp_path / "store") == {}
    other.leave.set()
    measuring.join(60)
    assert artifacts(tmp_path / "store").keys() == {work.key}
    other = Task(False)
    assert other.gets_in()
    assert find_costs.fn(work, site) == work.key
    other.leave.set()


CLAIM = """
import sys
from tasks.turns import claim

with claim(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "done"])
def test_the_same_work_is_left_to_who_is_at_it_and_free_once_that_process_ended(end):
    start = [sys.executable, "-c", CLAIM, "this work"]
    with subprocess.Popen(start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        with claim("other work"):
            pass
        got = threading.Event()

        def wait_for_it():
            with claim("this work"):
                got.set()

        waiting = threading.Thread(target=wait_for_it, daemon=True)
        waiting.start()
        assert not got.wait(0.3)
        if end == "killed":
            holder.kill()
        else:
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        assert got.wait(10)
        waiting.join()
    assert not list(place().glob("claim-*"))


def test_many_who_want_the_same_work_are_at_it_one_after_another():
    inside, most = [], []

    def take():
        for _ in range(20):
            with claim("this work"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (80, 1)
