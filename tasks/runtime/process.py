"""Which process is at a run, written down so that another process can tell later whether it still lives.

A process id alone is used again, after a restart of the machine above all. So the machine, its boot and the moment at
which the process started are said too, from `/proc`. Where there is none, nothing is ever known to be dead.
"""

import hashlib
import os
import socket
from pathlib import Path
from typing import NamedTuple

STATE, STARTED = 0, 19  # of what follows the name of the program in /proc/PID/stat


class _Process(NamedTuple):
    host: str
    machine: str
    boot: str
    namespace: str
    pid: str
    started_ticks: str


def this_process() -> str:
    """The process at hand, in one line: host, machine, boot, namespace, id, and clock ticks from boot to its start."""
    pid = str(os.getpid())
    try:
        return " ".join(_Process(*_here(), pid, _started(pid)))
    except OSError:
        return ""


def is_gone(said: str) -> bool:
    """Whether the process that `this_process` said this of has ended; false where that cannot be known from here.

    Of another machine, or of another container, nothing is known.
    """
    try:
        there, (host, machine, boot, namespace) = _Process(*said.split()), _here()
    except (TypeError, OSError):
        return False
    if (there.host, there.machine) != (host, machine):
        return False
    if there.boot != boot:
        return True
    return there.namespace == namespace and _started(there.pid) != there.started_ticks


def _here() -> tuple[str, str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), _machine(), boot, os.readlink("/proc/self/ns/pid")


def _machine() -> str:
    """What tells machines of one name apart, without giving its id away."""
    try:
        return hashlib.sha256(Path("/etc/machine-id").read_bytes()).hexdigest()[:12]
    except OSError:
        return "unknown"


def _started(pid: str) -> str:
    """When a process started, in ticks; empty where there is none, or one that only waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[STATE] in "ZX" else fields[STARTED]
