"""The places of a run: checkpoints end with their training, disks have room, and a parent is looked at once."""

import os

import pytest

from puzzle_core import text_sources
from puzzle_core.errors import DataError, NonFiniteError, StorageError
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec, RuntimeSpec
from tasks.runtime.context import RunContext
from tasks.store.store import Store
from tests.pico import edit_tensors
from tests.tasks.store.test_store import PlainRecord, PlainWork

TRAINING, OTHER = PlainWork(number=1), PlainWork(number=2)


@pytest.fixture
def context_of(checkpoint_of, tmp_path):
    """A site with an empty store, and values of its runtime."""

    def make(path=None, **runtime):
        places = {"store": str(tmp_path / "store"), "scratch": str(tmp_path / "scratch")}
        parent = ParentSpec(path=str(path or checkpoint_of("llama")))
        return RunContext(parent=parent, runtime=RuntimeSpec.model_validate(places | runtime))

    return make


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
        context.produce(TRAINING, fail)
    assert len(checkpoints(context)) == 4
    assert context.produce(TRAINING, train) == TRAINING.key
    assert {path.parent for path in checkpoints(context)} == {context.checkpoints(OTHER).file.parent}
    assert (context.store().fetch(TRAINING.key) / "weights.bin").read_text() == "weights"


def test_where_the_store_has_it_nothing_is_made_again_and_its_checkpoint_goes(context_of):
    context = context_of()
    context.produce(TRAINING, train)
    leave_checkpoint(context, TRAINING)
    context.produce(TRAINING, lambda _: pytest.fail("made again"))
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


def test_what_finishes_without_checkpoints_asks_the_scratch_for_no_listing(context_of, monkeypatch):
    context, listed = context_of(), []
    for number in range(10):
        leave_checkpoint(context, PlainWork(number=number))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(str(place)) or scandir(place))
    context.produce(PlainWork(number=100), lambda _: PlainRecord())
    assert not [place for place in listed if place.endswith("checkpoints")]


@pytest.mark.parametrize(
    ("scratch", "store", "key"), [(2**60, 0, "runtime.scratch"), (0, 2**60, "runtime.store")], ids=["scratch", "store"]
)
def test_a_run_that_a_disk_cannot_hold_is_refused_with_what_it_needs_and_where(context_of, scratch, store, key):
    context = context_of()
    context.check_room(2**10, 2**10)
    place = getattr(context.runtime, key.removeprefix("runtime."))
    with pytest.raises(
        StorageError, match=rf"^{place} has [\d,]+ MiB free, .* 1,099,511,627,776 MiB .*or set {key} to"
    ):
        context.check_room(scratch, store)


def test_a_remote_store_is_not_asked_for_room(context_of):
    context_of(store="memory://artifacts").check_room(0, 2**60)


def test_a_place_that_cannot_be_a_directory_is_named(context_of, tmp_path):
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(StorageError, match=rf"cannot make the directory {tmp_path}/scratch .*: set runtime.scratch"):
        context_of().check_room(0, 0)


def test_weights_are_looked_at_once_and_again_when_they_change(context_of, copy_of, monkeypatch):
    directory, looks, check = copy_of("llama"), [], Parent.check_finite
    monkeypatch.setattr(Parent, "check_finite", lambda parent: looks.append(1) or check(parent))
    first = context_of(directory).parent_digest()
    assert context_of(directory).parent_digest() == first == Parent(ParentSpec(path=str(directory))).digest
    assert len(looks) == 1
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"][0].fill_(float("inf")))
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' has 1 NaN or infinite"):
        context_of(directory).parent_digest()
    with pytest.raises(NonFiniteError):  # what was refused is not remembered as seen
        context_of(directory).parent_digest()
    assert len(looks) == 3


def test_texts_are_read_once_and_again_when_they_change(context_of, tmp_path, monkeypatch):
    texts, looks, read = tmp_path / "texts", [], text_sources.read_documents
    monkeypatch.setattr("tasks.runtime.context.read_documents", lambda sources: looks.append(1) or read(sources))
    texts.mkdir()
    (texts / "a.txt").write_text("one")
    first = context_of().texts_digest((str(texts),))
    assert context_of().texts_digest((str(texts),)) == first == text_sources.digest_documents(read([str(texts)]))
    assert len(looks) == 1
    (texts / "b.txt").write_text("two")
    second = context_of().texts_digest((str(texts),))
    (texts / "b.txt").write_text("three")
    assert len({first, second, context_of().texts_digest((str(texts),))}) == len(looks) == 3
    (texts / "b.txt").write_bytes(b"caf\xe9")
    for _ in range(2):  # what was refused is not remembered as read
        with pytest.raises(DataError, match="is not UTF-8"):
            context_of().texts_digest((str(texts),))
    with pytest.raises(DataError, match="does not exist"):
        context_of().texts_digest((str(tmp_path / "nothing"),))


def test_an_opened_store_is_shared(context_of):
    assert isinstance(context_of().store(), Store)
    assert context_of().store() is context_of().store()
