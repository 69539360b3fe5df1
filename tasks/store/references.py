"""Which artifacts refer to which: the keys that a work names, and the walk along such references."""

import re
from collections.abc import Callable, Iterable

from puzzle_core.records import Work, canonical_json
from tasks.store.manifest import KEY, Manifest
from tasks.store.store import Store

_NAMED = re.compile(rf"\b{KEY.pattern}\b")


def references(manifest: Manifest) -> set[str]:
    """The keys that an artifact's work names, except its own."""
    return set(_NAMED.findall(canonical_json(manifest.work))) - {manifest.key}


def read_keys(work: Work) -> list[str]:
    """The keys that a work names, and those of the works that it holds, in their order."""
    held = [value.key for _, value in work if isinstance(value, Work)]
    return list(dict.fromkeys([*held, *_NAMED.findall(work.model_dump_json())]))


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
