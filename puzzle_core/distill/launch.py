"""Launches the worker processes of a shared GKD training (gkd_worker.py) by torchrun, and reads their messages."""

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from puzzle_core import errors
from puzzle_core.distill.loop import Progress
from puzzle_core.errors import LostProcessError, PuzzleError
from puzzle_core.parent_death import end_with_parent
from puzzle_core.records import Record
from puzzle_core.spec import ParentSpec
from puzzle_core.work import GkdRecord, GkdWork

log = logging.getLogger("puzzle")
POLL_SECONDS = 0.2
STOP_SECONDS = 10
"""How long torchrun may take to end after SIGTERM, before all processes get SIGKILL."""
LOG_TAIL_LINES = 20
MESSAGE_PREFIX = "puzzle-gkd "
"""Start of an output line that holds a message; all other lines are plain log output."""


class GkdRequest(Record):
    """The work of the processes; all paths are on disks that every machine can access."""

    work: GkdWork
    parent: ParentSpec
    child_dir: str
    tokens_dir: str
    out_dir: str
    checkpoint: str
    checkpoint_seconds: float


def record_path(request: Path) -> Path:
    """The file that gets the record of a request."""
    return request.with_suffix(".record.json")


def store_path(request: Path) -> Path:
    """The file by which the processes of one machine find each other."""
    return request.with_suffix(".store")


class Launch(Record):
    """Number of processes per machine, number of machines, and their rendezvous (`host:port` of the first machine).

    Processes of one machine meet over files and talk over the loopback interface: PyTorch's TCP store would accept
    connections on every interface.
    """

    processes: int
    machines: int = 1
    rendezvous: str | None = None

    def command(self, request: Path) -> list[str]:
        """The command that each machine runs."""
        endpoint = [str(self.rendezvous)]
        if self.machines == 1:
            endpoint = [str(_rendezvous_path(request)), "--rdzv-conf", "store_type=file"]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)),
            *("--nnodes", str(self.machines), "--rdzv-backend", "c10d", "--rdzv-id", request.stem),
            *("--rdzv-endpoint", *endpoint),
            *("-m", "puzzle_core.distill.gkd_worker", str(request)),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that keep the processes of one machine off the network."""
        if self.machines > 1:
            return {}
        interfaces = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback_interface())
        return interfaces | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def loopback_interface() -> str:
    """The name of this machine's loopback interface."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _rendezvous_path(request: Path) -> Path:
    return request.with_suffix(".rendezvous")


def launch(
    request: GkdRequest,
    layout: Launch,
    file: Path,
    report: Callable[[Progress], None] | None = None,
    environment: dict[str, str] | None = None,
) -> GkdRecord:
    """Launch the processes of a request and wait until they end.

    Args:
        layout: the processes and machines that share the training.
        file: path of the request file; the record and the processes' log are written beside it.
        report: called with every progress message.
        environment: variables added to the environment of the processes.

    Raises:
        PuzzleError: a process sent an error; the exception has the class and the message that the process sent.
        LostProcessError: the processes ended without a record; the message has the last lines of their log.
    """
    request.write(file)
    for earlier in (record_path(file), store_path(file), _rendezvous_path(file)):
        earlier.unlink(missing_ok=True)
    command, log_file = layout.command(file), file.with_suffix(".log")
    if layout.machines > 1:
        log.info("waiting for %d more machines to run: %s", layout.machines - 1, " ".join(command))
    with (
        log_file.open("w") as output,
        _running(command, layout.environment | (environment or {}), output) as process,
        log_file.open() as lines,
    ):
        while True:
            ended = process.poll() is not None
            for line in lines:
                _handle_line(line, report)
            if ended:
                break
            time.sleep(POLL_SECONDS)
    if process.returncode or not record_path(file).exists():
        last_lines = "\n".join(log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise LostProcessError(
            f"the GKD processes ended with exit code {process.returncode} and without a result; last lines of their "
            f"log {log_file}:\n{last_lines}\nrun again to go on from the last checkpoint"
        )
    return GkdRecord.read(record_path(file))


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], output: TextIO) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; end it when the block ends, and when this process ends for any reason."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _handle_line(line: str, report: Callable[[Progress], None] | None) -> None:
    """Act on the message of an output line; log a line that holds none.

    Raises:
        PuzzleError: the message is an error.
    """
    if not line.startswith(MESSAGE_PREFIX):
        log.debug("GKD: %s", line.rstrip())
        return
    message: dict[str, Any] = json.loads(line.removeprefix(MESSAGE_PREFIX))
    if "error" in message:
        kind = getattr(errors, message["error"], PuzzleError)
        raise kind(message["message"])
    if "log" in message:
        log.info("GKD: %s", message["log"])
    elif report:
        report(Progress(**message["progress"]))
