"""The parent-death signal of Linux, which ends a process when its parent process ends."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Constant of <sys/prctl.h>."""


def end_with_parent(signal_number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent process ends; no effect outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
