"""Waiting for tasks: all are waited for, and every failure is told."""

import pytest

from flows.build_library import build_library
from flows.submit import wait_all
from puzzle_core.errors import NonFiniteError, PuzzleError
from tests.workflow import artifacts, of_stage


class Ended:
    """A future that has ended."""

    def __init__(self, error=None):
        self.error, self.asked = error, False

    def result(self):
        self.asked = True
        if self.error:
            raise self.error


def test_every_failure_is_told_once_all_have_ended():
    futures = [Ended(NonFiniteError("layer 1 diverged")), Ended(), Ended(NonFiniteError("layer 2 diverged")), Ended()]
    with pytest.raises(PuzzleError, match=r"^2 of 9 BLD tasks failed:\nlayer 1 diverged\nlayer 2 diverged$"):
        wait_all("BLD", futures, done_before=5, total=9)
    assert all(future.asked for future in futures)


def test_a_failure_that_many_tasks_share_is_told_once():
    futures = [Ended(NonFiniteError("the store is away")) for _ in range(3)]
    with pytest.raises(PuzzleError, match=r"^3 of 3 scores tasks failed:\nthe store is away \(3 times\)$"):
        wait_all("scores", futures)


def test_our_own_mistakes_are_not_made_the_users():
    with pytest.raises(KeyError):
        wait_all("BLD", [Ended(KeyError("ours"))])


def test_nothing_to_wait_for_is_well():
    wait_all("BLD", [])


def test_a_task_that_takes_too_long_is_named_and_the_store_stays_whole(spec_of, prefect_server, tmp_path):
    spec = spec_of(bld={"epochs": 1_000_000}, runtime={"task_timeout_s": 8})
    with pytest.raises(PuzzleError, match=r"2 of 10 BLD tasks failed:\n(bld layer 0 \S+: .*task_timeout_s.*\n?){2}"):
        build_library(spec)
    assert of_stage(artifacts(tmp_path / "store"), "bld") == set()
    assert not list((tmp_path / "store" / ".staging").glob("*"))
