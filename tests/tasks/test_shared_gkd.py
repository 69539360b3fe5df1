"""GKD shared by two machines, as a task: started here and by hand there, one artifact under the same key."""

import logging
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from flows.services.prefect_server import free_port
from puzzle_core.work import GkdRecord
from tasks import stage_progress
from tasks.stage_tasks import distil_child
from tasks.tracking.tracking import tracked
from tests.workflow import artifacts, changed, of_stage, plan_of

ROOT = Path(__file__).parents[2]


def test_two_machines_make_the_artifact_that_one_process_makes(finished, again, prefect_server, caplog, monkeypatch):
    monkeypatch.setattr(stage_progress, "LEAST_SECONDS", 0)
    meeting = {"gkd_machines": 2, "gkd_rendezvous": f"localhost:{free_port()}"}
    spec = again(runtime=meeting)
    plan, context = plan_of(spec)
    (key,) = of_stage(artifacts(spec.runtime.store), "gkd")
    manifest = context.store().manifest(key)
    alone = GkdRecord.model_validate(manifest.record)
    shutil.rmtree(Path(spec.runtime.store) / key)
    before = artifacts(spec.runtime.store)
    work = plan.gkd(alone.architecture)
    assert work.key == key
    failed = []

    def distil():
        try:
            with tracked("shared", spec) as run:
                distil_child.fn(work, run, context)
        except BaseException as error:
            failed.append(error)

    with caplog.at_level(logging.INFO, "puzzle"):
        here = threading.Thread(target=distil)
        here.start()
        there = subprocess.run(_asked(caplog), shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
        here.join()
    assert failed == []
    assert there.returncode == 0, there.stderr
    assert changed(before, artifacts(spec.runtime.store)) == {key}
    shared = GkdRecord.model_validate(context.store().manifest(key).record)
    assert shared.tokens == alone.tokens
    for one, other in zip(alone.curve, shared.curve, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert not list((Path(spec.runtime.scratch) / "checkpoints").rglob("*.json"))
    assert any("gkd: 2 of 2, 100" in record.message for record in caplog.records)


def _asked(caplog):
    """The command that the run asks other machines to run."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for record in caplog.records:
            _, asked, command = record.getMessage().partition("waiting for 1 more machines to run: ")
            if asked:
                return command
        time.sleep(0.05)
    raise AssertionError("nothing was asked")
