"""Items that several threads of a process need in the same order: each is loaded once and handed to all of them.

The items are the batches that the variants of a layer train on (distill/batches.py), or the layers that the states of
several scores run through (scoring.py). An item has named parts, and a reader needs some of them. No reader is more
than a few items ahead of the slowest, so few items are in memory. A reader that fails leaves, and the others go on. One
that comes late, for instance a task that is tried again, does not hold up the others: it has a sequence of its own.
"""

import itertools
import threading
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from puzzle_core.compute_slots import POLL_SECONDS, ComputeSlot

Part = TypeVar("Part")
Load = Callable[[int, frozenset[str]], dict[str, Part]]
"""Loads these parts of the item at a position."""


class SharedSequence(Generic[Part]):
    """Items that are loaded when the first reader needs them, and dropped when the last one has taken them."""

    def __init__(self, load: Load[Part], *, ahead: int, join_within: int, load_computes: bool):
        """A sequence without readers.

        Args:
            load: loads parts of an item.
            ahead: items that are kept at most, from the first that some reader has not taken.
            join_within: a reader may join as long as at most this many items were loaded.
            load_computes: whether loading needs a compute slot; reading a file does not.
        """
        self._load, self._ahead, self._join_within = load, ahead, join_within
        self._next: WeakKeyDictionary[Reader[Part], int] = WeakKeyDictionary()
        self._items: dict[int, dict[str, Part]] = {}
        self._loading: dict[int, Reader[Part]] = {}
        self._first: int | None = None
        self._loads = 0
        self._changed = threading.Condition()
        self.load_computes, self.number = load_computes, next(_numbers)

    def admit(self, reader: "Reader[Part]", first: int) -> bool:
        """Add a reader that will take items from position `first` on, unless the others are too far."""
        with self._changed:
            if self._loads > self._join_within:
                return False
            self._next[reader] = first
            return True

    def dismiss(self, reader: "Reader[Part]") -> None:
        """Remove a reader; what it was loading, another one loads."""
        with self._changed:
            self._next.pop(reader, None)
            self._loading = {position: loader for position, loader in self._loading.items() if loader is not reader}
            self._drop_taken()
            self._changed.notify_all()

    def find(self, reader: "Reader[Part]", position: int, wait: bool) -> "_Found[Part] | None":
        """The item at a position, or which parts of it this reader is to load; none if neither is possible yet."""
        with self._changed:
            self._next[reader] = position
            self._drop_taken()
            while position in self._loading or not reader.needs <= self._items.get(position, {}).keys():
                if position not in self._loading and position < min(self._next.values()) + self._ahead:
                    self._loading[position] = reader
                    wanted = frozenset[str]().union(*(r.needs for r, first in self._next.items() if first <= position))
                    return _Found({}, wanted - self._items.get(position, {}).keys())
                if not wait:
                    return None
                self._changed.wait(POLL_SECONDS)
            return _Found(self._taken(reader, position), frozenset())

    def peek(self, reader: "Reader[Part]", position: int) -> dict[str, Part] | None:
        """The item at a position if it is in memory; it does not count as taken."""
        with self._changed:
            item = self._items.get(position, {})
            return dict(item) if reader.needs <= item.keys() else None

    def load(self, reader: "Reader[Part]", position: int, parts: frozenset[str]) -> dict[str, Part]:
        """Load parts of an item for all readers."""
        loaded: dict[str, Part] = {}
        try:
            loaded = self._load(position, parts)
        finally:
            with self._changed:
                self._loading.pop(position, None)
                self._items.setdefault(position, {}).update(loaded)
                self._changed.notify_all()
        with self._changed:
            self._loads += 1
            return self._taken(reader, position)

    def _taken(self, reader: "Reader[Part]", position: int) -> dict[str, Part]:
        item = dict(self._items[position])
        self._next[reader] = position + 1
        self._drop_taken()
        return item

    def _drop_taken(self) -> None:
        """Drop the items that no reader will ask for, and wake those who wait for the slowest reader."""
        first = min(self._next.values(), default=None)
        self._items = {
            position: item for position, item in self._items.items() if first is not None and position >= first
        }
        if first != self._first:
            self._first = first
            self._changed.notify_all()


class _Found(NamedTuple, Generic[Part]):
    """An item, or the parts of it that the reader is to load."""

    item: dict[str, Part]
    to_load: frozenset[str]


class Reader(Generic[Part]):
    """One thread's way through a sequence, and its compute slot, which it gives up where it waits for others.

    As a context manager: it leaves the sequence and gives up its slot at the end.
    """

    def __init__(self, needs: frozenset[str], slot: ComputeSlot):
        self.needs, self.slot = needs, slot
        self._sequence: SharedSequence[Part]

    def __enter__(self) -> "Reader[Part]":
        self.slot.take(self._sequence.number, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._sequence.dismiss(self)
        self.slot.give_up()

    def take(self, position: int) -> dict[str, Part]:
        """The item at a position, with all parts that this reader needs. Positions must rise from call to call."""
        sequence = self._sequence
        found = sequence.find(self, position, wait=False)
        if found is None:
            self.slot.give_up()
            found = sequence.find(self, position, wait=True)
        assert found is not None
        item = found.item
        if found.to_load:
            if sequence.load_computes:
                self.slot.take(sequence.number, position)
            else:
                self.slot.give_up()
            item = sequence.load(self, position, found.to_load)
        self.slot.take(sequence.number, position)
        return item

    def peek(self, position: int) -> dict[str, Part] | None:
        """The item at a position if it is in memory, without waiting for it or taking it."""
        return self._sequence.peek(self, position)


_numbers = itertools.count()
_lock = threading.Lock()
# `Hashable` and `object`: sequences of every type of part are in one table.
_sequences: WeakValueDictionary[Hashable, SharedSequence[object]] = WeakValueDictionary()


def join(
    key: Hashable, make: Callable[[], SharedSequence[Part]], needs: frozenset[str], slot: ComputeSlot, first: int = 0
) -> Reader[Part]:
    """A reader of this process's sequence of this key.

    Args:
        key: equal for readers that need the same items in the same order.
        make: makes the sequence where there is none, or where its readers are too far.
        needs: names of the parts that this reader needs.
        slot: of the calling thread.
        first: position from which it reads.
    """
    reader: Reader[Part] = Reader(needs, slot)
    with _lock:
        sequence: SharedSequence[Part] | None = _sequences.get(key)  # type: ignore[assignment]
        if sequence is None or not sequence.admit(reader, first):
            sequence = make()
            sequence.admit(reader, first)
            _sequences[key] = sequence  # type: ignore[assignment]
        reader._sequence = sequence
    return reader
