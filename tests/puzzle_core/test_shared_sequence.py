"""A shared sequence: every item is loaded once for all readers, and none holds up the others by failing or lateness."""

import ctypes
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.shared_sequence import SharedSequence, join

LONG_SECONDS = 30


class Loads:
    """What is loaded, how often, and how much of it is in memory; an item's part is its name and position."""

    def __init__(self, fails=()):
        self.counts, self.fails = Counter(), list(fails)

    def make(self, ahead=2, join_within=100, load_computes=False):
        self.sequence = SharedSequence(self.load, ahead=ahead, join_within=join_within, load_computes=load_computes)
        return self.sequence

    def load(self, position, parts):
        if position in self.fails:
            self.fails.remove(position)
            raise OSError(f"cannot read {position}")
        self.counts.update((position, part) for part in parts)
        return {part: (part, position) for part in parts}


def readers(key, loads, *needs, most=1, **options):
    """Readers that have joined one sequence, each with a slot on one device."""
    return [join(key, lambda: loads.make(**options), frozenset(parts), ComputeSlot(str(key), most)) for parts in needs]


def run(reader, positions, at=lambda position: None):
    with reader:
        taken = []
        for position in positions:
            taken.append(reader.take(position))
            at(position)
        return taken


@pytest.mark.parametrize("load_computes", [True, False])
def test_every_item_is_loaded_once_and_few_are_in_memory(load_computes):
    loads, most_kept = Loads(), []
    joined = readers(
        f"once {load_computes}", loads, *[{"a"}] * 3, *[{"b"}] * 2, {"a", "b"}, most=2, load_computes=load_computes
    )

    def look(_):
        most_kept.append(len(loads.sequence._items))

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda reader: run(reader, range(20), look), joined))
    for reader, taken in zip(joined, results, strict=True):
        for position, item in enumerate(taken):
            assert {part: item[part] for part in reader.needs} == {part: (part, position) for part in reader.needs}
    assert loads.counts == {(position, part): 1 for position in range(20) for part in "ab"}
    assert max(most_kept) <= 2
    assert not loads.sequence._items


def test_a_reader_that_fails_leaves_and_the_others_go_on():
    loads = Loads()
    one, other = readers("fails", loads, {"a"}, {"a"})

    def fail(position):
        if position == 3:
            raise ValueError("diverged")

    with ThreadPoolExecutor(2) as pool:
        failing, going = pool.submit(run, one, range(10), fail), pool.submit(run, other, range(10))
        with pytest.raises(ValueError, match="diverged"):
            failing.result(LONG_SECONDS)
        assert len(going.result(LONG_SECONDS)) == 10
    assert set(loads.counts.values()) == {1}


def test_an_item_that_one_cannot_load_another_loads():
    loads = Loads(fails=[2])
    joined = readers("error", loads, {"a"}, {"a"})
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, reader, range(5)) for reader in joined]
        errors = [future.exception(LONG_SECONDS) for future in futures]
    assert sorted(map(str, errors)) == ["None", "cannot read 2"]
    assert loads.counts[2, "a"] == 1


def test_a_reader_that_starts_further_on_takes_what_the_others_load():
    loads = Loads()
    whole, rest = readers("resumed", loads, {"a"}, {"a"})
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, whole, range(10)), pool.submit(run, rest, [0, 6, 7, 8, 9])]
        assert [len(future.result(LONG_SECONDS)) for future in futures] == [10, 5]
    assert set(loads.counts.values()) == {1}


def test_a_late_reader_holds_up_nobody():
    loads, late_loads = Loads(), Loads()
    early, also_early = readers("late", loads, {"a"}, {"a"}, join_within=3)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, reader, range(6)) for reader in (early, also_early)]
        assert [len(future.result(LONG_SECONDS)) for future in both] == [6, 6]
    [late] = readers("late", late_loads, {"a"}, join_within=3)
    assert late._sequence is not early._sequence
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(run, late, range(6)).result(LONG_SECONDS)) == 6
    assert sum(loads.counts.values()) == sum(late_loads.counts.values()) == 6


def test_a_reader_may_join_while_little_is_loaded():
    loads = Loads()
    [early] = readers("soon", loads, {"a"}, join_within=3)
    with early:
        early.take(0)
        [soon] = readers("soon", loads, {"a"}, join_within=3, most=2)
        assert soon._sequence is early._sequence
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run, soon, [0, 1])
            assert len(future.result(LONG_SECONDS)) == 2
        assert early.take(1) == {"a": ("a", 1)}


class Cancelled(BaseException):
    """As the task runner's."""


def test_a_thread_that_waits_can_be_cancelled():
    loads, begun, ended = Loads(), threading.Event(), []
    ahead, behind = readers("cancelled", loads, {"a"}, {"a"})

    def wait():
        try:
            run(ahead, range(5), lambda position: begun.set() if position == 1 else None)
        except Cancelled:
            ended.append(ahead)

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(LONG_SECONDS)  # it waits for the other one now, or soon
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
    thread.join(LONG_SECONDS)
    assert ended == [ahead]
    assert len(run(behind, range(5))) == 5
