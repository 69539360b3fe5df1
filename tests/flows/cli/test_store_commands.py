"""`puzzle store`: what it says of a store, that it finds damage, and that a dry run is one."""

import re
import time
from pathlib import Path

import pytest

from flows.cli.main import main
from tasks.store.store import Store
from tests.tasks.store.test_garbage import ChildWork, LibraryWork, TokensWork, publish


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path, monkeypatch):
    """A store of either kind; caches lie below the working directory."""
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture
def family(url, tmp_path):
    """The keys of tokens, of two blocks, and of a child of the first one."""
    store = Store(url, tmp_path / "cache")
    tokens = publish(store, TokensWork())
    blocks = [publish(store, LibraryWork(tokens=tokens, number=number)) for number in range(2)]
    return tokens, blocks, publish(store, ChildWork(library=((("ffn:i8", blocks[0]),),)))


@pytest.fixture
def command(url, family, capsys):
    """Run `puzzle store`: its exit code, and what it printed and said."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["store", *arguments, "--store", url])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def harm(url, key, tmp_path):
    """Change the weights of an artifact where they are stored."""
    if "://" not in url:
        (Path(url) / key / "weights.bin").write_text("X" * len(key))
        return
    store = Store(url, tmp_path / "harming")
    path = f"{url.removeprefix('s3://')}/{key}/{store.manifest(key).place}/weights.bin"
    store._bucket.fs.pipe_file(path, b"X" * len(key))


def test_ls_counts_what_is_there_and_what_nothing_descends_from(command):
    code, shown, _ = command("ls")
    assert code == 0
    rows = {line.split()[0]: line.split()[1::2] for line in shown.splitlines()}
    assert rows["bld"] == ["2", "1"]
    assert rows["tokens"] == ["1", "0"]
    assert rows["all"] == ["4", "1"]


def test_ls_of_a_stage_names_every_artifact_and_how_many_use_it(command, family):
    _, shown, _ = command("ls", "bld")
    used = {key: re.search(rf"{key}.*\s(\d+)  ", shown)[1] for key in family[1]}
    assert used == {family[1][0]: "1", family[1][1]: "0"}
    assert family[0] not in shown


def test_show_says_what_an_artifact_refers_to_and_what_refers_to_it(command, family):
    tokens, blocks, child = family
    code, shown, _ = command("show", blocks[0])
    assert code == 0
    own, used_by = shown.split("used by: 1")
    assert f"refers to: 1\n  {tokens}" in own
    assert child in used_by
    assert "weights.bin" in own


@pytest.mark.parametrize(
    ("key", "said"), [("../../etc", "is no key of an artifact"), (f"bld/v1/{'0' * 40}", "is not in the store")]
)
def test_show_of_what_is_not_there_is_one_message(command, key, said):
    code, shown, error = command("show", key)
    assert (code, shown) == (1, "")
    assert said in error


def test_verify_finds_one_altered_file_among_all(command, family, url, tmp_path):
    assert command("verify") == (0, "4 artifacts, every byte as it was stored\n", "")
    harm(url, family[1][1], tmp_path)
    code, shown, error = command("verify")
    assert code == 1
    assert shown == f"{family[1][1]}/weights.bin: {len(family[1][1])} bytes, altered\n"
    assert "1 of 4 artifacts" in error
    assert command("verify", "child")[0] == 0


def test_gc_removes_old_unused_artifacts_and_a_dry_run_none(command, family, url, tmp_path, monkeypatch):
    spare = family[1][1]
    assert command("gc")[1].startswith("removed: 0 of 4")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 40 * 86_400)
    assert command("gc", "--dry-run")[1].startswith(f"{spare}\nwould remove: 1 of 4")
    assert command("gc", "--older-than", "60")[1].startswith("removed: 0 of 4")
    assert Store(url, tmp_path / "another").has(spare)
    assert command("gc")[1].startswith(f"{spare}\nremoved: 1 of 4")
    assert Store(url, tmp_path / "another").keys() == {family[0], family[1][0], family[2]}
