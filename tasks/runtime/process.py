"""The identity of a process as one line of text, from which another process can tell later whether it still runs.

The system reuses process ids, above all after a restart. The line therefore also holds the machine, its boot id, and
the time at which the process started, all from `/proc`. On a system without `/proc` no process counts as ended.
"""

import hashlib
import os
import socket
from pathlib import Path
from typing import NamedTuple

STATE, START_TIME = 0, 19
"""Positions in /proc/PID/stat after the name of the program."""


class _Process(NamedTuple):
    host: str
    machine: str
    boot: str
    namespace: str
    pid: str
    start_ticks: str


def this_process() -> str:
    """The identity of this process: host, machine, boot, PID namespace, id, and clock ticks from boot to its start.

    Empty on a system without `/proc`.
    """
    pid = str(os.getpid())
    try:
        return " ".join(_Process(*_this_system(), pid, _start_ticks(pid)))
    except OSError:
        return ""


def is_gone(identity: str) -> bool:
    """Whether the process of this identity has ended; false where that cannot be known from here.

    It is not known of a process on another machine or in another container.

    Args:
        identity: what `this_process` returned there.
    """
    try:
        process, (host, machine, boot, namespace) = _Process(*identity.split()), _this_system()
    except (TypeError, OSError):
        return False
    if (process.host, process.machine) != (host, machine):
        return False
    if process.boot != boot:
        return True
    return process.namespace == namespace and _start_ticks(process.pid) != process.start_ticks


def _this_system() -> tuple[str, str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), _machine(), boot, os.readlink("/proc/self/ns/pid")


def _machine() -> str:
    """A digest of the machine's id: it distinguishes machines of one host name and does not disclose the id."""
    try:
        return hashlib.sha256(Path("/etc/machine-id").read_bytes()).hexdigest()[:12]
    except OSError:
        return "unknown"


def _start_ticks(pid: str) -> str:
    """When a process started, in clock ticks since boot; empty for a zombie, and where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[STATE] in "ZX" else fields[START_TIME]
