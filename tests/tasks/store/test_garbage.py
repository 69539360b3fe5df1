"""What refers to what, and what goes: never what something kept descends from, nor what is young."""

import time
from typing import ClassVar

import pytest

from puzzle_core.errors import ArtifactError
from puzzle_core.records import Work
from tasks.store.garbage import Inventory, collect_garbage
from tasks.store.store import MANIFEST, Store
from tests.tasks.store.test_store import PlainRecord, PlainWork

DAY = 86_400.0


class TokensWork(PlainWork):
    """What others are trained on."""

    stage: ClassVar[str] = "tokens"


class LibraryWork(Work):
    """A trained block."""

    stage: ClassVar[str] = "bld"
    version: ClassVar[int] = 1

    tokens: str
    number: int


class ChildWork(Work):
    """What is made of blocks; keys lie deep in it."""

    stage: ClassVar[str] = "child"
    version: ClassVar[int] = 1

    library: tuple[tuple[tuple[str, str], ...], ...]


def publish(store, work):
    with store.staging() as staged:
        (staged / "weights.bin").write_text(work.key)
        store.publish(work, PlainRecord(), staged, "a test")
    return work.key


@pytest.fixture
def family(store):
    """Two splits of tokens, a block trained on each, and a child of the first block."""
    tokens = [publish(store, TokensWork(number=number)) for number in range(2)]
    blocks = [publish(store, LibraryWork(tokens=key, number=number)) for number, key in enumerate(tokens)]
    child = publish(store, ChildWork(library=(((f"attn:{0}", blocks[0]),),)))
    return tokens, blocks, child


def later(days=31.0):
    return time.time() + days * DAY


def test_what_a_child_descends_from_stays_and_the_rest_goes_when_it_is_old(store, family):
    tokens, blocks, child = family
    _, gone = collect_garbage(store, later(), 30, dry_run=False)
    assert set(gone) == {tokens[1], blocks[1]}
    assert store.keys() == {tokens[0], blocks[0], child}
    assert store.fetch(blocks[0]).joinpath("weights.bin").read_text() == blocks[0]
    assert Inventory.of(store).strays == {}


def test_a_dry_run_says_the_same_and_removes_nothing(store, family):
    before = store.listing()
    _, gone = collect_garbage(store, later(), 30, dry_run=True)
    assert set(gone) == {family[0][1], family[1][1]}
    assert store.listing() == before


def test_what_is_young_stays_and_so_does_what_it_descends_from(store, family):
    assert collect_garbage(store, later(29), 30, dry_run=False)[1] == []
    tokens, blocks, _ = family
    inventory = Inventory.of(store)
    young = inventory.artifacts[blocks[1]]._replace(modified_s=later())
    inventory.artifacts[blocks[1]] = young
    assert inventory.garbage(later(1))[0] == set()
    assert tokens[1] in inventory.unreferenced()


def test_when_a_child_is_deleted_its_blocks_go(store, family):
    store.delete(family[2])
    assert len(collect_garbage(store, later(), 30, dry_run=False)[1]) == 4
    assert store.keys() == set()


def test_files_of_no_artifact_go_when_they_are_old(store, family):
    child = family[2]
    if store.is_local:
        (store._root / child / MANIFEST).unlink()
    else:
        store._bucket.remove([f"{child}/{MANIFEST}"])
    assert collect_garbage(store, time.time(), 30, dry_run=False)[1] == []
    assert [path for path in collect_garbage(store, later(), 30, dry_run=False)[1] if path.startswith("child/")]
    assert not [path for path in store.listing() if path.startswith("child/")]


def test_nothing_goes_while_a_manifest_is_unreadable(store, family):
    key = family[2]
    if store.is_local:
        (store._root / key / MANIFEST).write_text("{")
    else:
        store._bucket.remove([f"{key}/{MANIFEST}"])
        store._bucket.put_new(f"{key}/{MANIFEST}", b"{")
    fresh = Store(store.url, store._cache.directory)
    before = fresh.listing()
    with pytest.raises(ArtifactError, match=f"manifest of {key} .* damaged"):
        collect_garbage(fresh, later(), 30, dry_run=False)
    assert fresh.listing() == before


def test_uploads_that_never_ended_go_when_they_are_old(bucket, tmp_path, s3):
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    s3.client().create_multipart_upload(Bucket=name, Key=f"{prefix}/child/v1/x/weights")
    store = Store(bucket, tmp_path)
    if s3.kind == "ceph":  # moto's uploads all began in 2010
        assert collect_garbage(store, time.time(), 30, dry_run=False)[1] == []
    assert collect_garbage(store, later(), 30, dry_run=True)[1] == ["1 unfinished uploads"]
    assert collect_garbage(store, later(), 30, dry_run=False)[1] == ["1 unfinished uploads"]
    assert collect_garbage(store, later(), 30, dry_run=False)[1] == []
