"""One of several processes that distil a child together; started by torchrun, on one machine or on many.

    torchrun --nproc-per-node 8 -m puzzle_core.distill.gkd_worker REQUEST.json

Reads a request, trains, and writes the child where the request says; the record goes beside the request. What happens
is told in lines of JSON on the standard output, for whoever started the processes (launch.py).
"""

import json
import logging
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

from puzzle_core.device import available_cores, use_threads
from puzzle_core.distill import gkd
from puzzle_core.distill.distributed import joined
from puzzle_core.distill.launch import TOLD, GkdRequest, record_of
from puzzle_core.distill.loop import Checkpoints, Progress
from puzzle_core.errors import ParentError, PuzzleError
from puzzle_core.model.parent import Parent
from puzzle_core.parent_death import end_with_parent


def main(arguments: list[str]) -> int:
    """Take part in the training of one request; 0 when it is done, 1 for an error that speaks to the user."""
    ours = logging.getLogger("puzzle_core")
    ours.setLevel(logging.WARNING if int(os.environ["RANK"]) else logging.INFO)
    ours.addHandler(_StdoutHandler())
    use_threads(available_cores() // int(os.environ["LOCAL_WORLD_SIZE"]))
    file = Path(arguments[0])
    request = GkdRequest.read(file)
    try:
        _distil(request, record_of(file))
    except PuzzleError as error:
        send(error=type(error).__name__, message=str(error))
        return 1
    return 0


def _distil(request: GkdRequest, record_file: Path) -> None:
    def report(progress: Progress) -> None:
        send(progress=progress._asdict())

    parent = Parent(request.parent)
    if os.environ["LOCAL_RANK"] == "0":
        _check_parent(parent, request.work.parent)
    with joined() as together:
        record = gkd.distil(
            request.work,
            parent,
            Path(request.child_dir),
            Path(request.tokens_dir),
            Path(request.out_dir),
            Checkpoints(Path(request.checkpoint), request.checkpoint_seconds),
            report if together.leads else None,
            together=together,
        )
        if together.leads:
            record.write(record_file)


def _check_parent(parent: Parent, digest: str) -> None:
    """Compare the parent on this machine with the one that the work names.

    Raises:
        ParentError: it is another one.
    """
    if parent.digest != digest:
        raise ParentError(
            f"the parent {parent.directory} on {platform.node()} is not the one of this run: its digest was {digest} "
            f"when the run started, and is {parent.digest} here: copy the same files to every machine, and start again"
        )


class _StdoutHandler(logging.Handler):
    """Sends log records to the process that started this one."""

    def emit(self, record: logging.LogRecord) -> None:
        send(log=self.format(record))


def send(**what: Any) -> None:
    """Write one line of JSON to the standard output, which the starting process reads."""
    sys.stdout.write(f"{TOLD}{json.dumps(what)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)  # the parent is torchrun
    sys.exit(main(sys.argv[1:]))
