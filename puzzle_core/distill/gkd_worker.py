"""One worker process of a GKD training that several processes share; torchrun starts it, on one or several machines.

    torchrun --nproc-per-node 8 -m puzzle_core.distill.gkd_worker REQUEST.json

The worker reads a request, trains the child and writes it to the directory that the request names. The record is
written beside the request. The worker sends progress, log lines and errors as lines of JSON on its standard output;
launch.py reads them.
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
from puzzle_core.distill.distributed import sharded_group
from puzzle_core.distill.launch import MESSAGE_PREFIX, GkdRequest, record_path, store_path
from puzzle_core.distill.loop import Progress
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import ParentError, PuzzleError
from puzzle_core.model.parent import Parent
from puzzle_core.parent_death import end_with_parent


def main(arguments: list[str]) -> int:
    """Train the child of one request; return 0 for success and 1 for a PuzzleError, which is sent first."""
    package_log = logging.getLogger("puzzle_core")
    package_log.setLevel(logging.WARNING if int(os.environ["RANK"]) else logging.INFO)
    package_log.addHandler(_StdoutHandler())
    use_threads(available_cores() // int(os.environ["LOCAL_WORLD_SIZE"]))
    file = Path(arguments[0])
    request = GkdRequest.read(file)
    try:
        _distil(request, file)
    except PuzzleError as error:
        send(error=type(error).__name__, message=str(error))
        return 1
    return 0


def _distil(request: GkdRequest, file: Path) -> None:
    def report(progress: Progress) -> None:
        send(progress=progress._asdict())

    parent = Parent(request.parent)
    if os.environ["LOCAL_RANK"] == "0":
        _check_parent(parent, request.work.parent)
    one_machine = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    with sharded_group(store_path(file) if one_machine else None) as group:
        record = gkd.distil(
            request.work,
            parent,
            Path(request.child_dir),
            Path(request.tokens_dir),
            Path(request.out_dir),
            Checkpoints(Path(request.checkpoint), request.checkpoint_seconds),
            report if group.leads else None,
            group=group,
        )
        if group.leads:
            record.write(record_path(file))


def _check_parent(parent: Parent, digest: str) -> None:
    """Check that the parent on this machine is the one that the work names.

    Raises:
        ParentError: its digest differs.
    """
    if parent.digest != digest:
        raise ParentError(
            f"the parent {parent.directory} on {platform.node()} is not the one of this run: its digest was {digest} "
            f"when the run started, and is {parent.digest} here: copy the same files to every machine and run again"
        )


class _StdoutHandler(logging.Handler):
    """Sends log records to the launching process."""

    def emit(self, record: logging.LogRecord) -> None:
        send(log=self.format(record))


def send(**message: Any) -> None:
    """Write one message as a line of JSON to the standard output, which the launching process reads."""
    sys.stdout.write(f"{MESSAGE_PREFIX}{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)  # the parent process is torchrun
    sys.exit(main(sys.argv[1:]))
