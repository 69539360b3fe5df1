"""Which device runs, and how many threads it may use."""

import os

import torch


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(threads: int) -> None:
    """Let torch use this many threads in the calling thread, and no more than there are cores."""
    torch.set_num_threads(max(1, min(threads, available_cores())))
