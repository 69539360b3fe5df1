"""The store: whole artifacts or none, one of each, checked when they are read; local, and as buckets are used."""

import errno
import os
import subprocess
import sys
import threading
import uuid
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from puzzle_core.errors import ArtifactError, SpecError, StorageError
from puzzle_core.records import Record, Work
from tasks.store import store as store_module
from tasks.store.store import MANIFEST, Store

TEXT = "weights" * 1000


class PlainWork(Work):
    """Work of a stage of our own."""

    stage: ClassVar[str] = "plain"
    version: ClassVar[int] = 1

    number: int = 0


class PlainRecord(Record):
    """What it says."""

    found: str = "all well"


class InterruptedStageError(Exception):
    """What stops a stage in the middle."""


@pytest.fixture
def local(tmp_path):
    return Store(str(tmp_path / "store"), tmp_path / "cache")


WORK = PlainWork()


def publish(store, work=WORK, text=TEXT, made_by="a test"):
    with store.staging() as staged:
        (staged / "weights.bin").write_text(text)
        (staged / "figures").mkdir()
        (staged / "figures" / "curve.svg").write_text("curve")
        store.publish(work, PlainRecord(), staged, made_by)
    return work.key


def reopened(store, tmp_path):
    """The same store as another machine sees it: nothing remembered, nothing kept."""
    return Store(store.url, tmp_path / "another-cache")


def test_what_is_published_is_fetched_by_anyone(store, tmp_path):
    key = publish(store)
    for reader in (store, reopened(store, tmp_path)):
        directory = reader.fetch(key)
        assert (directory / "weights.bin").read_text() == TEXT
        assert (directory / "figures" / "curve.svg").read_text() == "curve"


def test_an_artifact_is_there_once_published_and_gone_once_deleted(store):
    key, other = PlainWork(number=1).key, publish(store, PlainWork(number=2))
    assert not store.has(key)
    assert publish(store, PlainWork(number=1)) == key
    assert store.has(key)
    store.delete(key)
    assert not store.has(key)
    assert store.has(other)


def test_keys_are_those_of_the_stage(store):
    class OtherWork(PlainWork):
        stage: ClassVar[str] = "plainer"

    assert store.keys("plain") == set()
    published = {publish(store, PlainWork(number=number)) for number in range(3)}
    publish(store, OtherWork())
    assert store.keys("plain") == published


def test_manifest_says_what_was_asked_and_found_and_by_whom(store):
    manifest = store.manifest(publish(store, PlainWork(number=7), made_by="flow x"))
    assert (manifest.work, manifest.record) == ({"number": 7}, {"found": "all well"})
    assert manifest.files["weights.bin"].size_bytes == len(TEXT)
    assert manifest.made_by == "flow x"


def test_missing_artifact_is_named_with_what_to_do(store):
    with pytest.raises(ArtifactError, match=rf"{WORK.key} is not in the store .*: run the flow"):
        store.fetch(WORK.key)


def test_unreadable_manifest_is_named(local, tmp_path):
    key = publish(local)
    (tmp_path / "store" / key / MANIFEST).write_text('{"key": ')
    with pytest.raises(ArtifactError, match=f"manifest of {key} .* damaged: delete"):
        local.manifest(key)


def test_directory_without_a_record_does_not_exist_and_is_replaced(local, tmp_path):
    key = publish(local)
    (tmp_path / "store" / key / MANIFEST).unlink()
    (tmp_path / "store" / key / "weights.bin").write_text("half")
    assert not local.has(key)
    assert local.keys("plain") == set()
    publish(local)
    assert (local.fetch(key) / "weights.bin").read_text() == TEXT


def test_a_whole_artifact_is_not_written_again(local, tmp_path):
    key = publish(local)
    publish(local, text="something else under the same key")
    assert (reopened(local, tmp_path).fetch(key) / "weights.bin").read_text() == TEXT


@pytest.mark.parametrize(("mask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_others_may_read_what_the_umask_lets_them(local, mask, file_mode, directory_mode):
    before = os.umask(mask)
    try:
        with local.staging() as staged:
            save_file({"weights": torch.zeros(1)}, staged / "weights.safetensors")
            (staged / "figures").mkdir()
            (staged / "figures" / "curve.svg").write_text("curve")
            local.publish(WORK, PlainRecord(), staged, "a test")
    finally:
        os.umask(before)
    directory = local.fetch(WORK.key)
    found = [(path.is_dir(), path.stat().st_mode & 0o777) for path in (directory, *directory.rglob("*"))]
    assert set(found) == {(True, directory_mode), (False, file_mode)}
    assert len(found) == 5


def test_a_crash_while_staging_leaves_nothing(store, tmp_path):
    def interrupted():
        with store.staging() as staged:
            (staged / "weights.bin").write_text(TEXT)
            raise InterruptedStageError

    with pytest.raises(InterruptedStageError):
        interrupted()
    assert not store.has(WORK.key)
    assert store.keys("plain") == set()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_crash_while_publishing_leaves_nothing_under_the_key(store, monkeypatch):
    def interrupt(*_, **__):
        raise InterruptedStageError

    place = (store_module.os, "rename") if store.is_local else (store._bucket.fs, "pipe_file")
    monkeypatch.setattr(*place, interrupt)
    with pytest.raises(InterruptedStageError):
        publish(store)
    monkeypatch.undo()
    assert not store.has(WORK.key)
    assert (store.fetch(publish(store)) / "weights.bin").read_text() == TEXT


def test_what_a_killed_process_staged_is_cleared_away(local, tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from tasks.store.store import Store\n"
        "with Store(sys.argv[1], Path('unused')).staging() as staged:\n"
        "    (staged / 'weights.bin').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, local.url], check=False)
    left = list((tmp_path / "store").rglob("weights.bin"))
    assert len(left) == 1
    with local.staging() as own, local.staging() as beside:
        assert not left[0].exists()
        assert own.exists()
        assert beside.exists()


def test_threads_that_publish_one_key_end_with_one_whole_artifact(store, tmp_path):
    directory = tmp_path / "store" / WORK.key
    if store.is_local:
        directory.mkdir(parents=True)
        (directory / "weights.bin").write_text("half")
    barrier, failed = threading.Barrier(8), []

    def write():
        barrier.wait()
        try:
            publish(store)
        except Exception as error:
            failed.append(error)

    writers = [threading.Thread(target=write) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert store.keys("plain") == {WORK.key}
    assert (reopened(store, tmp_path).fetch(WORK.key) / "weights.bin").read_text() == TEXT
    assert not list(tmp_path.rglob(".staging/*"))


def test_processes_that_publish_one_key_end_with_one_whole_artifact(local, tmp_path):
    script = (
        "import sys; from pathlib import Path; from tasks.store.store import Store\n"
        "from tests.tasks.store.test_store import publish\n"
        "sys.stdin.readline(); publish(Store(sys.argv[1], Path('unused')), made_by=sys.argv[2])"
    )
    start = [sys.executable, "-c", script, local.url]
    writers = [subprocess.Popen([*start, name], stdin=subprocess.PIPE) for name in ("first", "second")]
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (local.fetch(WORK.key) / "weights.bin").read_text() == TEXT
    assert local.manifest(WORK.key).made_by in ("first", "second")
    assert len(list((tmp_path / "store").rglob("weights.bin"))) == 1


DAMAGE = {
    "altered": (lambda file: file.write_text("W" + TEXT[1:]), "7,000 bytes, altered now"),
    "truncated": (lambda file: file.write_text(TEXT[:100]), "100 bytes now"),
    "deleted": (lambda file: file.unlink(), "nothing now"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_and_the_artifact_to_delete(local, tmp_path, damage):
    key, (harm, said) = publish(local), DAMAGE[damage]
    harm(tmp_path / "store" / key / "weights.bin")
    with pytest.raises(ArtifactError, match=rf"{key}/weights.bin .* {said}\): delete {tmp_path}/store/{key} and run"):
        local.fetch(key)


def test_damaged_local_copy_of_a_remote_artifact_is_fetched_again(tmp_path):
    store = Store(f"memory://{uuid.uuid4().hex}", tmp_path / "cache")
    key = publish(store)
    (store.fetch(key) / "weights.bin").write_text("W" + TEXT[1:])
    assert (Store(store.url, tmp_path / "cache").fetch(key) / "weights.bin").read_text() == TEXT


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_is_the_users_error(store, code, monkeypatch):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module, "digest_file", fail)
    with pytest.raises(StorageError, match=f"cannot write to .*{os.strerror(code)}; free some space"):
        publish(store)
    assert not store.has(WORK.key)


def test_tensors_that_do_not_fit_on_the_disk_are_the_users_error(small_disk, tmp_path):
    store = Store(str(small_disk / "store"), tmp_path)
    full = pytest.raises(StorageError, match=f"cannot write to {small_disk}.*No space left on device")
    with full, store.staging() as staged:
        save_file({"weights": torch.zeros(2**20)}, staged / "weights.safetensors")
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_other_failures_of_the_system_stay_what_they_are(store):
    with pytest.raises(ConnectionResetError) as caught, store.staging():
        raise ConnectionResetError("try again")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["gopher://artifacts", "s4://bucket/prefix"])
def test_unknown_protocol_is_refused_by_name(url, tmp_path):
    with pytest.raises(SpecError, match=f"runtime.store '{url}' is no store: .*{url.split(':')[0]}"):
        Store(url, tmp_path)
