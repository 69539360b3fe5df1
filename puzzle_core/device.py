"""Which device runs, and how many threads it may use."""

import itertools
import os
import threading

import torch

_numbers, _thread = itertools.count(), threading.local()


def default_device() -> torch.device:
    """The CPU, or the calling thread's own GPU: threads take GPUs in turns and keep them."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not hasattr(_thread, "gpu"):
        _thread.gpu = next(_numbers) % torch.cuda.device_count()
    return torch.device("cuda", _thread.gpu)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(threads: int) -> None:
    """Let torch use this many threads in the calling thread, and no more than there are cores."""
    torch.set_num_threads(max(1, min(threads, available_cores())))
