"""Progress of long stages: a line at most every ten seconds, with the time left by a clock of the test's own."""

import logging

import pytest

from tasks import stage_progress
from tasks.stage_progress import StageProgress


class Shown:
    """Stands in for Prefect's artifact, whose own test needs a server; keeps what it is asked to show."""

    exists = False

    def __init__(self, stage, name):
        self.seen = []
        SHOWN.append(self)

    def show(self, percent, text):
        self.exists = True
        self.seen.append((percent, text))


SHOWN = []


@pytest.fixture
def progress(monkeypatch, caplog):
    """A progress, its clock as a list of one number, and what was logged and shown."""
    monkeypatch.setattr(stage_progress, "ProgressArtifact", Shown)
    caplog.set_level(logging.INFO)
    clock = [100.0]

    def make(**options):
        made = StageProgress("importance", "pico", clock=lambda: clock[0], **options)
        return made, clock, SHOWN[-1].seen

    return make


def test_a_short_stage_shows_nothing(progress, caplog):
    made, clock, shown = progress()
    for done in range(1, 5):
        clock[0] += 2
        made.show(done, 4)
    assert (shown, caplog.messages) == ([], [])


def test_the_end_of_a_short_stage_is_shown_where_it_is_asked_for(progress, caplog):
    made, _, shown = progress(shows_end=True)
    made.show(1, 2)
    made.show(2, 2)
    assert (shown, caplog.messages) == ([(100, "2 of 2, 100.0 %")], [])


def test_a_long_stage_says_every_ten_seconds_how_long_it_will_take(progress, caplog):
    made, clock, shown = progress()
    for done in range(1, 121):
        clock[0] += 0.5
        made.show(done, 120, "loss 0.5")
    assert caplog.messages == [
        "importance: 20 of 120, 16.7 %, 50.0 s left; loss 0.5",
        "importance: 40 of 120, 33.3 %, 40.0 s left; loss 0.5",
        "importance: 60 of 120, 50.0 %, 30.0 s left; loss 0.5",
        "importance: 80 of 120, 66.7 %, 20.0 s left; loss 0.5",
        "importance: 100 of 120, 83.3 %, 10.0 s left; loss 0.5",
        "importance: 120 of 120, 100.0 %; loss 0.5",
    ]
    assert [percent for percent, _ in shown] == pytest.approx([100 * part / 6 for part in range(1, 7)])


def test_the_end_is_shown_where_the_way_was(progress):
    made, clock, shown = progress()
    clock[0] += 12
    made.show(1, 2)
    clock[0] += 1
    made.show(2, 2)
    assert [text for _, text in shown] == ["1 of 2, 50.0 %, 12.0 s left", "2 of 2, 100.0 %"]


def test_what_was_done_before_took_no_time(progress, caplog):
    """90 of 100 stand in the store; the other ten take six seconds each."""
    made, clock, _ = progress(done=90)
    for done in range(91, 97):
        clock[0] += 6
        made.show(done, 100)
    assert caplog.messages == [
        "importance: 92 of 100, 92.0 %, 48.0 s left",
        "importance: 94 of 100, 94.0 %, 36.0 s left",
        "importance: 96 of 100, 96.0 %, 24.0 s left",
    ]
