"""Threads that stop when their run is cancelled.

The runner uses private parts of Prefect (`_executor`, the call of `cancel_all`) and of Python (`_threads`, the frame
`_worker`, asynchronous exceptions). These tests fail when one of them changes.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prefect import flow, task

from flows.task_runners.threads import CancellableThreadTaskRunner, RunCancelled, _is_busy

LONGEST_SECONDS = 60


@pytest.fixture
def pool():
    """The runner, started, and Prefect's executor within it."""
    with CancellableThreadTaskRunner(max_workers=2) as runner:
        yield runner, runner._executor


class Endless:
    """A function that runs until it is stopped, and notes its beginning and its end."""

    def __init__(self):
        self.began, self.ended = threading.Event(), threading.Event()

    def __call__(self):
        try:
            self.began.set()
            while True:
                time.sleep(0.01)
        finally:
            self.ended.set()


def test_prefect_runs_tasks_in_threads_that_its_executor_lists(pool):
    _, executor = pool
    assert isinstance(executor, ThreadPoolExecutor)
    assert executor.submit(threading.get_ident).result() in {thread.ident for thread in executor._threads}


def test_a_thread_is_busy_while_it_is_in_a_task_and_not_after_it(pool):
    _, executor = pool
    began, go_on = threading.Event(), threading.Event()

    def wait():
        began.set()
        assert go_on.wait(LONGEST_SECONDS)

    future = executor.submit(wait)
    assert began.wait(LONGEST_SECONDS)
    (thread,) = executor._threads
    assert _is_busy(thread)
    go_on.set()
    future.result()
    deadline = time.monotonic() + LONGEST_SECONDS
    while _is_busy(thread) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_busy(thread)


def test_cancelling_stops_the_running_task_and_drops_the_waiting_one(pool):
    runner, executor = pool
    tasks = [Endless() for _ in range(3)]
    running, *_, waiting = [executor.submit(endless) for endless in tasks]
    assert tasks[0].began.wait(LONGEST_SECONDS)
    assert tasks[1].began.wait(LONGEST_SECONDS)
    runner.cancel_all()
    assert tasks[0].ended.wait(LONGEST_SECONDS)
    assert tasks[1].ended.wait(LONGEST_SECONDS)
    assert isinstance(running.exception(LONGEST_SECONDS), RunCancelled)
    assert waiting.cancelled()
    assert not tasks[2].began.is_set()


def test_prefect_cancels_the_tasks_of_a_flow_that_fails(prefect_server):
    endless = Endless()

    @task
    def run_endlessly():
        endless()

    @flow(task_runner=CancellableThreadTaskRunner(max_workers=1))
    def fails():
        run_endlessly.submit()
        assert endless.began.wait(LONGEST_SECONDS)
        raise ValueError("this flow fails")

    with pytest.raises(ValueError, match="this flow fails"):
        fails()
    assert endless.ended.wait(LONGEST_SECONDS)
