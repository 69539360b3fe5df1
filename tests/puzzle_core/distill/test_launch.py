"""Processes that share GKD: a lost one is reported, none keeps running, an error keeps its message."""

import json
import logging
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from puzzle_core import errors
from puzzle_core.distill import gkd_worker
from puzzle_core.distill.launch import GkdRequest, Launch, launch
from puzzle_core.errors import LostProcessError, NonFiniteError, ParentError
from puzzle_core.spec import ParentSpec
from tests.conftest import MIXED
from tests.puzzle_core.distill.two_processes import work_of
from tests.sockets import listening


@pytest.fixture
def request_of(checkpoint_of, parent, assemble, tokens_dir, tmp_path):
    """A request, with changes of the GKD spec."""
    (tmp_path / "out").mkdir()
    return lambda **spec: GkdRequest(
        work=work_of(spec).model_copy(update={"parent": parent.digest}),
        parent=ParentSpec(path=str(checkpoint_of("llama"))),
        child_dir=str(assemble("llama", MIXED)),
        tokens_dir=str(tokens_dir),
        out_dir=str(tmp_path / "out"),
        checkpoint=str(tmp_path / "checkpoint.safetensors"),
        checkpoint_seconds=0,
    )


def processes(file):
    """Ids of the processes that work on a request, torchrun's own last."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(file).encode() in words:
            found.append((b"torch.distributed.run" in words, int(place.name)))
    return [number for _, number in sorted(found)]


def test_a_machine_with_another_parent_is_refused(request_of, tmp_path):
    request = request_of()
    request = request.model_copy(update={"work": request.work.model_copy(update={"parent": "another"})})
    with pytest.raises(
        ParentError, match=rf"its digest was another when the run started, and is {'[0-9a-f]' * 40} here"
    ):
        launch(request, Launch(processes=1), tmp_path / "request.json")


class Cancelled(BaseException):
    """What a cancelled run raises, wherever it is."""


def none_left(file):
    deadline = time.monotonic() + 60
    while processes(file) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes(file) == []


def test_a_lost_process_ends_all_and_a_cancelled_run_too_and_the_checkpoint_stays(request_of, tmp_path, caplog):
    request, file = request_of(epochs=1_000_000), tmp_path / "request.json"
    steps = []

    def kill_one(progress):
        steps.append(progress.step)
        if progress.step == 3:
            *workers, _torchrun = processes(file)
            assert len(workers) == 2
            opened = listening(map(psutil.Process, processes(file)))
            assert {address.ip for address in opened} == {"127.0.0.1"}
            os.kill(workers[-1], signal.SIGKILL)

    def cancel(progress):
        steps.append(progress.step)
        assert len(processes(file)) == 2
        assert {address.ip for address in listening(map(psutil.Process, processes(file)))} <= {"127.0.0.1"}
        raise Cancelled

    with pytest.raises(LostProcessError, match=r"(?s)SIGKILL.*run again to go on from the last checkpoint"):
        launch(request, Launch(processes=2), file, kill_one)
    assert steps[:3] == [1, 2, 3]
    assert none_left(file)
    with caplog.at_level(logging.INFO, "puzzle"), pytest.raises(Cancelled):
        launch(request, Launch(processes=1), file, cancel)
    assert none_left(file)
    assert steps[-1] >= 3
    assert f"GKD: resuming at step {steps[-1]} from {request.checkpoint}" in caplog.messages


def test_an_error_keeps_its_words_from_process_to_run(request_of, tmp_path, monkeypatch, capsys):
    file = tmp_path / "request.json"
    request_of(optimizer={"learning_rate": 1e30, "gradient_clip": 1e30}).write(file)
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": 0}).items():
        monkeypatch.setenv(name, str(value))
    assert gkd_worker.main([str(file)]) == 1
    messages = [json.loads(line.removeprefix("puzzle-gkd ")) for line in capsys.readouterr().out.splitlines()]
    assert messages[0]["progress"]["step"] == 1
    assert getattr(errors, messages[-1]["error"]) is NonFiniteError
    assert "GKD diverged" in messages[-1]["message"]
