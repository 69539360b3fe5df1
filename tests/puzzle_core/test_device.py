"""Threads: as many as asked for, never more than there are cores, never none."""

import pytest
import torch

from puzzle_core import device


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (1, 1), (3, 3), (1000, 4)])
def test_threads_are_at_most_the_cores(asked, given, monkeypatch):
    seen = []
    monkeypatch.setattr(device, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    device.use_threads(asked)
    assert seen == [given]


def test_there_is_at_least_one_core():
    assert device.available_cores() >= 1
