"""Locks on one machine: side by side, alone, never starved, a GPU for each task, and free again after kill -9."""

import fcntl
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from puzzle_core.architecture import Architecture
from puzzle_core.device import default_device, visible_gpus
from puzzle_core.errors import SpecError
from tasks import stage_tasks
from tasks.runtime import locks
from tasks.runtime.locks import artifact_lock, gpu_lock, lock_directory, machine_lock, shared_gpu
from tasks.stage_tasks import find_costs
from tasks.store.store import Store
from tasks.task_policies import with_gpu
from tests.workflow import artifacts, plan_of

ROOT = Path(__file__).parents[3]
LONG_SECONDS = 120
"""Longer than anything takes that comes; what must not come is looked for far less long."""
HOLD = """
import sys, time
from tasks.runtime.locks import machine_lock

with machine_lock(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""
HOLD_GPUS = """
import sys, time
from tasks.runtime import locks

locks.gpu_names = lambda: ["a", "b", "c"]
with locks.gpu_lock(int(sys.argv[1])) as numbers:
    print(*numbers, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Locks of this test only."""
    monkeypatch.setenv("PUZZLE_LOCK_DIR", str(tmp_path / "locks"))


@pytest.fixture
def hold():
    """Hold a lock in another process."""
    started = []

    def begin(how, script=HOLD, says=b"in\n"):
        process = subprocess.Popen([sys.executable, "-c", script, how], cwd=ROOT, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == says
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class Task(threading.Thread):
    """A task that holds the machine lock until it is released."""

    def __init__(self, mode):
        super().__init__(daemon=True)
        self.mode, self.inside, self.leave = mode, threading.Event(), threading.Event()
        self.start()

    def run(self):
        with machine_lock(self.mode):
            self.inside.set()
            self.leave.wait(LONG_SECONDS)

    def gets_in(self, within=LONG_SECONDS):
        return self.inside.wait(within)


@pytest.fixture
def three_gpus(monkeypatch):
    """A machine with three GPUs, as far as locks are concerned."""
    monkeypatch.setattr(locks, "gpu_names", lambda: ["a", "b", "c"])


def wait_until_held(name):
    """Wait until a task holds a lock alone."""
    deadline = time.monotonic() + LONG_SECONDS
    while time.monotonic() < deadline:
        with (lock_directory() / name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        time.sleep(0.01)
    raise AssertionError(f"nobody holds the lock {name}")


class GpuTask(Task):
    """A task that takes GPUs, until it is let go."""

    def __init__(self, count):
        self.count, self.numbers = count, None
        super().__init__("shared")

    def run(self):
        with gpu_lock(self.count) as self.numbers:
            self.inside.set()
            self.leave.wait(LONG_SECONDS)


def test_every_task_has_a_gpu_of_its_own(three_gpus):
    tasks = [GpuTask(1) for _ in range(3)]
    assert all(task.gets_in() for task in tasks)
    assert sorted(task.numbers for task in tasks) == [[0], [1], [2]]
    fourth = GpuTask(1)
    assert not fourth.gets_in(0.4)
    tasks[1].leave.set()
    assert fourth.gets_in()
    assert fourth.numbers == tasks[1].numbers
    for task in (*tasks, fourth):
        task.leave.set()


def test_gpus_are_shared_with_other_processes_and_free_after_a_kill(three_gpus, hold):
    other = hold("2", HOLD_GPUS, b"0 1\n")
    task, waiting = GpuTask(1), None
    assert task.gets_in()
    assert task.numbers == [2]
    waiting = GpuTask(2)
    wait_until_held("gpu-queue")
    assert not waiting.gets_in(0.4)
    later = GpuTask(1)
    task.leave.set()
    assert not later.gets_in(0.4)  # it waits behind the one that wants two
    other.send_signal(signal.SIGKILL)
    assert waiting.gets_in()
    assert later.gets_in()
    assert sorted(waiting.numbers + later.numbers) == [0, 1, 2]
    waiting.leave.set()
    later.leave.set()


def test_a_task_computes_on_its_gpu_and_comes_back_to_it(three_gpus):
    barrier = threading.Barrier(3, timeout=LONG_SECONDS)

    @with_gpu
    def where():
        barrier.wait()
        device = default_device()
        barrier.wait()
        return device.type, device.index

    def twice():
        return where(), where()

    with ThreadPoolExecutor(3) as pool:
        seen = [future.result() for future in [pool.submit(twice) for _ in range(3)]]
    assert sorted(first for first, _ in seen) == [("cuda", 0), ("cuda", 1), ("cuda", 2)]
    assert sorted(second for _, second in seen) == [("cuda", 0), ("cuda", 1), ("cuda", 2)]


class SharingTask(GpuTask):
    """A task that shares a GPU with others of this process, until it is let go."""

    def run(self):
        with shared_gpu(self.count) as self.numbers:
            self.inside.set()
            self.leave.wait(LONG_SECONDS)


def test_tasks_side_by_side_share_gpus_and_wait_behind_those_of_other_runs(three_gpus, hold):
    tasks = [SharingTask(2) for _ in range(3)]
    assert all(task.gets_in() for task in tasks)
    assert sorted(task.numbers for task in tasks) == [[0], [0], [1]]
    other = GpuTask(2)
    wait_until_held("gpu-queue")
    late = SharingTask(2)
    assert not late.gets_in(0.4)
    next(task for task in tasks if task.numbers == [1]).leave.set()
    assert other.gets_in()
    assert sorted(other.numbers) == [1, 2]
    assert late.gets_in()
    assert late.numbers == [0]
    for task in (*tasks, other, late):
        task.leave.set()


def test_every_task_that_computes_is_on_a_gpu(three_gpus, spec_of, monkeypatch):
    plan, context = plan_of(spec_of())
    child = Architecture.of_parent(plan.inputs.shape)
    monkeypatch.setattr(Store, "fetch", lambda store, key: Path(key))  # nothing has been made that could be fetched
    with locks.gpu_lock(3):
        for task, arguments in (
            (stage_tasks.measure_importance, (plan.importance(), context)),
            (stage_tasks.capture_layer, (plan.inputs.parent, plan.tokens("bld").key, "float32", 0, True, context)),
            (
                stage_tasks.capture_log_probabilities,
                (plan.inputs.parent, plan.tokens("scoring").key, "float32", context),
            ),
            (stage_tasks.train_variant, (plan.all_bld()[0], context)),
            (stage_tasks.score_block, (plan.all_scores()[0], context)),
            (stage_tasks.evaluate_model, (plan.evaluate(None), "parent", context)),
            (stage_tasks.distil_child, (plan.gkd(child), None, context)),
        ):
            monkeypatch.setattr(locks, "_wait", lambda *_: pytest.fail("waits"))
            with pytest.raises(pytest.fail.Exception, match="waits"):
                task.fn(*arguments)


def test_more_gpus_than_there_are_is_refused(three_gpus):
    with pytest.raises(SpecError, match=r"4 GPUs are asked for, but this machine has 3: lower runtime"), gpu_lock(4):
        pass


def test_other_processes_see_the_same_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus([]) == {}
    assert visible_gpus([2, 0]) == {"CUDA_VISIBLE_DEVICES": "2,0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7f")
    assert visible_gpus([1]) == {"CUDA_VISIBLE_DEVICES": "GPU-7f"}


def test_others_run_side_by_side_and_a_measurement_alone(hold):
    held = hold("shared")
    beside, alone = Task("shared"), None
    assert beside.gets_in()
    alone = Task("exclusive")
    assert not alone.gets_in(0.4)
    beside.leave.set()
    assert not alone.gets_in(0.4)
    held.send_signal(signal.SIGKILL)
    assert alone.gets_in()
    after = Task("shared")
    assert not after.gets_in(0.4)
    alone.leave.set()
    assert after.gets_in()
    after.leave.set()


def test_a_killed_measurement_leaves_no_lock(hold):
    measuring = hold("exclusive")
    waiting = Task("shared")
    assert not waiting.gets_in(0.4)
    measuring.send_signal(signal.SIGKILL)
    assert waiting.gets_in()
    waiting.leave.set()


def test_what_comes_later_waits_behind_a_measurement():
    first = Task("shared")
    assert first.gets_in()
    alone = Task("exclusive")
    wait_until_held("machine-queue")
    later = Task("shared")
    assert not later.gets_in(0.4)
    first.leave.set()
    assert alone.gets_in()
    assert not later.inside.is_set()
    alone.leave.set()
    assert later.gets_in()
    later.leave.set()


def test_a_lock_ends_with_an_error():
    with pytest.raises(KeyError), machine_lock("exclusive"):
        raise KeyError
    with machine_lock("exclusive"):
        pass


def test_costs_are_measured_alone_and_looked_up_at_once(spec_of, tmp_path, ticking):
    plan, context = plan_of(spec_of())
    (work,) = plan.costs().values()
    other = Task("shared")
    assert other.gets_in()
    measuring = threading.Thread(target=find_costs.fn, args=(work, context), daemon=True)
    measuring.start()
    measuring.join(1)
    assert artifacts(tmp_path / "store") == {}
    other.leave.set()
    measuring.join(LONG_SECONDS)
    assert artifacts(tmp_path / "store").keys() == {work.key}
    other = Task("shared")
    assert other.gets_in()
    assert find_costs.fn(work, context).name == "Cached"
    other.leave.set()


CLAIM = """
import sys
from tasks.runtime.locks import artifact_lock

with artifact_lock(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "done"])
def test_the_same_work_is_left_to_who_is_at_it_and_free_once_that_process_ended(end):
    start = [sys.executable, "-c", CLAIM, "this work"]
    with subprocess.Popen(start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        with artifact_lock("other work"):
            pass
        got = threading.Event()

        def wait_for_it():
            with artifact_lock("this work"):
                got.set()

        waiting = threading.Thread(target=wait_for_it, daemon=True)
        waiting.start()
        assert not got.wait(0.3)
        if end == "killed":
            holder.kill()
        else:
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        assert got.wait(LONG_SECONDS)
        waiting.join()
    assert not list(lock_directory().glob("artifact-*"))


def test_many_who_want_the_same_work_are_at_it_one_after_another():
    inside, most = [], []

    def take():
        for _ in range(20):
            with artifact_lock("this work"):
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
