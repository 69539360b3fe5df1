"""Whether a process lives is known from what it said of itself; of other machines and containers nothing is claimed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.runtime.process import is_gone, this_process

ROOT = Path(__file__).parents[3]
SAY = (
    "import sys; from tasks.runtime.process import this_process; print(this_process(), flush=True); "
    "sys.stdin.readline()"
)


@pytest.fixture
def other():
    """A process that lives, and what it said of itself."""
    start = [sys.executable, "-c", SAY]
    with subprocess.Popen(start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def edited(field, value):
    fields = this_process().split()
    fields[field] = value
    return " ".join(fields)


def test_a_process_is_gone_once_it_is_killed_even_before_anybody_collects_it(other):
    process, said = other
    assert said.split()[4] == str(process.pid)
    assert not is_gone(said)
    assert not is_gone(this_process())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
    assert is_gone(said)
    process.wait()
    assert is_gone(said)


@pytest.mark.parametrize(
    ("field", "value", "gone"),
    [
        (0, "another-host", False),
        (1, "another-machine", False),
        (2, "another-boot", True),
        (3, "pid:[1]", False),
        (5, "1", True),  # the id is used again
    ],
)
def test_what_is_known_of_a_process_that_differs_from_this_one(field, value, gone):
    assert is_gone(edited(field, value)) == gone


@pytest.mark.parametrize("said", ["", "nonsense", "a b c d e f g"])
def test_of_a_run_that_says_nothing_nothing_is_known(said):
    assert not is_gone(said)
