"""Starts the processes that distil a child together (gkd_worker.py) under torchrun, and follows what they tell."""

import contextlib
import functools
import json
import logging
import os
import signal
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
LOOK_SECONDS = 0.2
STOP_SECONDS = 10
LAST_LINES = 20


TOLD = "puzzle-gkd "
"""How the lines start that tell something; others are a log."""


class GkdRequest(Record):
    """What the processes are asked to do; all paths are on disks that every machine sees."""

    work: GkdWork
    parent: ParentSpec
    child_dir: str
    tokens_dir: str
    out_dir: str
    checkpoint: str
    checkpoint_seconds: float


def record_of(request: Path) -> Path:
    """Where the record of a request goes."""
    return request.with_suffix(".record.json")


class Launch(Record):
    """How many processes on how many machines, and where the machines meet (`host:port` of the first)."""

    processes: int
    machines: int = 1
    rendezvous: str | None = None

    def command(self, request: Path) -> list[str]:
        """What each machine has to run."""
        several = ["--nnodes", str(self.machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(self.rendezvous)]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)),
            *([*several, "--rdzv-id", request.stem] if self.machines > 1 else ["--standalone"]),
            *("-m", "puzzle_core.distill.gkd_worker", str(request)),
        ]


def launch(
    request: GkdRequest,
    how: Launch,
    file: Path,
    report: Callable[[Progress], None] | None = None,
    environment: dict[str, str] | None = None,
) -> GkdRecord:
    """Have a request done, and wait for it.

    Args:
        file: where the request is written; its record and the processes' log go beside it.
        environment: is added to that of the processes.

    Raises:
        PuzzleError: what a process said it was.
        LostProcessError: a process ended without a word; what was last logged.
    """
    request.write(file)
    record_of(file).unlink(missing_ok=True)
    command, said = how.command(file), file.with_suffix(".log")
    if how.machines > 1:
        log.info("waiting for %d more machines to run: %s", how.machines - 1, " ".join(command))
    with said.open("w") as output, _running(command, environment or {}, output) as process, said.open() as lines:
        while True:
            ended = process.poll() is not None
            for line in lines:
                _follow(line, report)
            if ended:
                break
            time.sleep(LOOK_SECONDS)
    if process.returncode or not record_of(file).exists():
        last = "\n".join(said.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise LostProcessError(
            f"GKD's processes ended with exit code {process.returncode} and without a result; what they last said (all "
            f"of it in {said}):\n{last}\nrun again to go on from the last checkpoint"
        )
    return GkdRecord.read(record_of(file))


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], output: TextIO) -> Iterator[subprocess.Popen[bytes]]:
    """A command that ends with the block, and with this process however that ends."""
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


def _follow(line: str, report: Callable[[Progress], None] | None) -> None:
    """Act on what a line tells; anything else is logged."""
    if not line.startswith(TOLD):
        log.debug("GKD: %s", line.rstrip())
        return
    told: dict[str, Any] = json.loads(line.removeprefix(TOLD))
    if "error" in told:
        kind = getattr(errors, told["error"], PuzzleError)
        raise kind(told["message"])
    if "log" in told:
        log.info("GKD: %s", told["log"])
    elif report:
        report(Progress(**told["progress"]))
