"""Which artifacts refer to which: the keys that a work names, and the walk along such references."""

import re
from collections.abc import Callable, Iterable

from puzzle_core.records import canonical_json
from tasks.store.manifest import KEY, Manifest
from tasks.store.store import Store


def references(manifest: Manifest) -> set[str]:
    """The keys that an artifact's work names, except its own."""
    return set(re.findall(rf"\b{KEY.pattern}\b", canonical_json(manifest.work))) - {manifest.key}


def reachable(start: Iterable[str], neighbours: Callable[[set[str]], Iterable[str]]) -> set[str]:
    """All keys that a walk visits, those it starts from included.

    Args:
        start: where the walk begins.
        neighbours: the next keys after a set of keys; is called once per step, with keys not visited before.
    """
    visited, frontier = set[str](), set(start)
    while frontier:
        visited |= frontier
        frontier = set(neighbours(frontier)) - visited
    return visited


def ancestors(store: Store, keys: Iterable[str]) -> list[str]:
    """These artifacts and all that they were made from, as far as the store has them, in the order of their keys."""
    stored = store.keys()

    def sources(frontier: set[str]) -> set[str]:
        return {key for manifest in store.manifests(frontier).values() for key in references(manifest)} & stored

    return sorted(reachable(keys, sources))
