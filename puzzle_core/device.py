"""Which device runs, and how many threads it may use."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import torch

_given: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("device", default=None)


def default_device() -> torch.device:
    """The device that was given to the task at hand; otherwise the first GPU, or the CPU where there is none."""
    return _given.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Give the thread at hand a device."""
    token = _given.set(device)
    try:
        yield
    finally:
        _given.reset(token)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(threads: int) -> None:
    """Let torch use this many threads in the calling thread, and no more than there are cores."""
    torch.set_num_threads(max(1, min(threads, available_cores())))
