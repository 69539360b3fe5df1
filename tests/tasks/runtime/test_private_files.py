"""What runs leave is their owner's, and locks lie in a directory that nobody else can prepare."""

import os

import pytest

from puzzle_core.errors import PuzzleError
from tasks.runtime import locks
from tasks.runtime.locks import artifact_lock, lock_directory
from tasks.runtime.private_files import private_directory


def mode(path):
    return path.stat().st_mode & 0o777


def test_what_lies_under_puzzle_is_the_owners_and_what_lies_above_is_left(tmp_path):
    data = tmp_path / ".puzzle"
    data.mkdir(mode=0o755)
    for name in ("mlflow.db", "mlflow.db-wal"):
        (data / name).touch(mode=0o644)
    before = mode(tmp_path)
    private_directory(data / "prefect")
    assert [mode(directory) for directory in (data, data / "prefect")] == [0o700, 0o700]
    assert [mode(file) for file in data.glob("mlflow*")] == [0o600, 0o600]
    assert mode(tmp_path) == before


def test_a_directory_elsewhere_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    private_directory(tmp_path)
    assert mode(tmp_path) == 0o755


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary directory of this machine's users; the lock directory in it is not made yet."""
    monkeypatch.delenv("PUZZLE_LOCK_DIR")
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_locks_lie_in_a_directory_of_the_user(temporary):
    with artifact_lock("a"):
        assert mode(lock_directory()) == 0o700
        assert lock_directory().parent == temporary


@pytest.mark.parametrize("prepared", ["link", "file", "writable"])
def test_a_lock_directory_that_another_user_can_prepare_is_refused(temporary, prepared):
    directory, other = lock_directory(), temporary / "other"
    other.mkdir()
    if prepared == "link":
        directory.symlink_to(other)
    elif prepared == "file":
        directory.touch()
    else:
        directory.mkdir()
        directory.chmod(0o777)
    with pytest.raises(PuzzleError, match="PUZZLE_LOCK_DIR"), artifact_lock("a"):
        pass
    assert list(other.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory to another user")
def test_a_lock_directory_of_another_user_is_refused(temporary):
    lock_directory().mkdir(mode=0o700)
    os.chown(lock_directory(), 12345, 12345)
    with pytest.raises(PuzzleError, match="belongs to user 12345"), artifact_lock("a"):
        pass
