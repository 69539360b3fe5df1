"""Artifacts are made once, and a checkpoint stays until its artifact is published."""

import os
import shutil
from pathlib import Path

import pytest

from puzzle_core.errors import NonFiniteError
from tasks.runtime.produce import produce
from tests.tasks.store.test_store import PlainRecord, PlainWork

TRAINING, OTHER = PlainWork(number=1), PlainWork(number=2)


def leave_checkpoint(context, work):
    """What a training has in scratch: its checkpoint, and what a killed process left of the next one."""
    file = context.checkpoints(work).file
    file.parent.mkdir(parents=True)
    for name in (file.name, f".{file.name}.4711"):
        (file.parent / name).write_text("weights")


def checkpoints(context):
    return [path for path in (context.scratch / "checkpoints").rglob("*") if path.is_file()]


def train(out_dir):
    (out_dir / "weights.bin").write_text("weights")
    return PlainRecord()


def test_a_checkpoint_stays_until_its_artifact_is_published_and_no_longer(context_of):
    context = context_of()
    leave_checkpoint(context, TRAINING)
    leave_checkpoint(context, OTHER)

    def fail(_):
        raise NonFiniteError("diverged")

    with pytest.raises(NonFiniteError):
        produce(TRAINING, context, fail)
    assert len(checkpoints(context)) == 4
    assert produce(TRAINING, context, train) == TRAINING.key
    assert {path.parent for path in checkpoints(context)} == {context.checkpoints(OTHER).file.parent}
    assert (context.store().fetch(TRAINING.key) / "weights.bin").read_text() == "weights"


def test_where_the_store_has_it_nothing_is_made_again_and_its_checkpoint_goes(context_of):
    context = context_of()
    produce(TRAINING, context, train)
    leave_checkpoint(context, TRAINING)
    produce(TRAINING, context, lambda _: pytest.fail("made again"))
    assert checkpoints(context) == []


def test_checkpoints_of_what_is_in_the_store_are_dropped_and_those_of_the_unfinished_kept(context_of):
    context = context_of()
    context.drop_finished_checkpoints()
    for work in (TRAINING, OTHER):
        leave_checkpoint(context, work)
    with context.store().staging() as staged:
        context.store().publish(TRAINING, train(staged), staged, "a process that was killed here")
    context.drop_finished_checkpoints()
    assert {path.parent for path in checkpoints(context)} == {context.checkpoints(OTHER).file.parent}


def test_checkpoints_that_another_run_removes_meanwhile_do_no_harm(context_of, monkeypatch):
    context, scandir = context_of(), os.scandir
    leave_checkpoint(context, TRAINING)

    def remove_first(place):
        if not isinstance(place, int) and Path(place).name == "v1":
            shutil.rmtree(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", remove_first)
    context.drop_finished_checkpoints()
    monkeypatch.undo()
    assert checkpoints(context) == []


def test_what_finishes_without_checkpoints_asks_the_scratch_for_no_listing(context_of, monkeypatch):
    context, listed = context_of(), []
    for number in range(10):
        leave_checkpoint(context, PlainWork(number=number))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(str(place)) or scandir(place))
    produce(PlainWork(number=100), context, lambda _: PlainRecord())
    assert not [place for place in listed if place.endswith("checkpoints")]
