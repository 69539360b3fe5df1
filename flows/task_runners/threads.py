"""Threads that run tasks side by side, and that stop within seconds when their run is cancelled.

Prefect's own runner waits until its threads have ended, which takes hours for a training. The worker then kills the
process, and neither Prefect nor MLflow learns that the run ended. This runner raises an exception in the threads, as an
interrupt does in the main thread: tasks remove their staged files, and the store stays consistent.
"""

import ctypes
import sys
import threading
from typing import Any

from prefect.task_runners import ThreadPoolTaskRunner


class RunCancelled(BaseException):
    """The run of a task was cancelled. A BaseException, so that tasks do not catch it by accident."""


class CancellableThreadTaskRunner(ThreadPoolTaskRunner):  # type: ignore[type-arg]
    """Prefect's thread pool, with threads that stop when their run ends."""

    def cancel_all(self) -> None:
        """Stop running tasks and drop waiting ones; Prefect calls it when a flow ends, after success too."""
        executor: Any = self._executor  # concurrent.futures has no public list of its threads
        for thread in executor._threads if executor else ():
            if _is_busy(thread):
                stop_thread(thread.ident)
        super().cancel_all()


def stop_thread(identity: int | None) -> None:
    """Raise `RunCancelled` in a thread of this process."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity or 0), ctypes.py_object(RunCancelled))


def _is_busy(thread: threading.Thread) -> bool:
    """Whether a thread of a pool runs a task: an idle thread is in the pool's function `_worker`."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name != "_worker"
