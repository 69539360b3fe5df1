"""Ending a process with the process that started it, by Linux's parent-death signal."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of <sys/prctl.h>."""


def end_with_parent(signal_number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends; does nothing but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
