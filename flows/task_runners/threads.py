"""Threads that run tasks side by side, and that stop within seconds when their run is cancelled.

Prefect's own runner waits for whatever its threads are doing, a training of hours for instance, until the worker loses
patience and kills the process; then nobody is left to say so in Prefect and MLflow. Here the tasks are stopped where
they are, as an interrupt stops the main thread: what they had staged is removed, and the store stays whole.
"""

import ctypes
import sys
import threading
from typing import Any

from prefect.task_runners import ThreadPoolTaskRunner


class Stopped(BaseException):
    """The run around a task was cancelled; not for tasks to catch."""


class CancellableThreadTaskRunner(ThreadPoolTaskRunner):  # type: ignore[type-arg]
    """As many threads as a site has cores or GPUs."""

    def cancel_all(self) -> None:
        """Stop what runs, drop what waits; called when a flow ends, however it ends."""
        executor: Any = self._executor
        for thread in executor._threads if executor else ():
            if _is_busy(thread):
                stop_thread(thread.ident)
        super().cancel_all()


def stop_thread(identity: int | None) -> None:
    """Raise `Stopped` in a thread of this process."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity or 0), ctypes.py_object(Stopped))


def _is_busy(thread: threading.Thread) -> bool:
    """Whether a thread of a pool is in a task, and not waiting for one."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name != "_worker"
