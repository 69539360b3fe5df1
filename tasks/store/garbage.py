"""What a store holds, what refers to what, and what nothing that is kept refers to any more.

References are the keys that an artifact's work names: a child's work names the library blocks it is made of, theirs
the tokens they were trained on. Kept for their own sake is every artifact but those of the stages below, which are
only ever made for others: children, searches and reports stay with everything that they descend from.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from puzzle_core.records import canonical_json
from tasks.store.bucket import Entry
from tasks.store.manifest import KEY, MANIFEST, Manifest
from tasks.store.store import Store

MADE_FOR_OTHERS = frozenset({"tokens", "importance", "bld", "score", "cost", "evaluation"})
DAY_SECONDS = 86_400.0


class Held(NamedTuple):
    """One artifact: its bytes, and when its record was written (epoch seconds)."""

    size_bytes: int
    modified_s: float


class Inventory(NamedTuple):
    """Everything in a store: artifacts by key, files of none by path, and manifests by key."""

    artifacts: dict[str, Held]
    strays: dict[str, Entry]
    manifests: dict[str, Manifest]

    @classmethod
    def of(cls, store: Store) -> "Inventory":
        """Look at a whole store: one listing, and every manifest.

        Raises:
            ArtifactError: a manifest is not readable, so nobody knows what it refers to.
        """
        listing = store.listing()
        records = {path.removesuffix(f"/{MANIFEST}"): entry for path, entry in listing.items() if _is_record(path)}
        manifests = store.manifests(records)
        sizes, strays = dict.fromkeys(records, 0), {}
        for path, entry in listing.items():
            key = "/".join(path.split("/")[:3])
            if key in manifests and _belongs(path, manifests[key]):
                sizes[key] += entry.size_bytes
            else:
                strays[path] = entry
        held = {key: Held(sizes[key], entry.modified_s) for key, entry in records.items()}
        return cls(held, strays, manifests)

    def references(self) -> dict[str, set[str]]:
        """The keys in this store that each artifact names."""
        return {key: references(manifest) & self.artifacts.keys() for key, manifest in self.manifests.items()}

    def referrers(self) -> dict[str, set[str]]:
        """The artifacts that name each key."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for key, named in self.references().items():
            for other in named:
                found[other].add(key)
        return found

    def unreferenced(self) -> set[str]:
        """Artifacts that nothing kept descends from."""
        roots = [key for key in self.artifacts if key.split("/")[0] not in MADE_FOR_OTHERS]
        return self.artifacts.keys() - ancestry(roots, self.references())

    def garbage(self, before_s: float) -> tuple[set[str], set[str]]:
        """Unreferenced artifacts, and files of none, that were written before a moment; what these name stays, too.

        An artifact that is young is a root for the time being: a run may be about to use what it descends from.
        """
        old = {key for key in self.unreferenced() if self.artifacts[key].modified_s < before_s}
        needed = ancestry(self.artifacts.keys() - old, self.references())
        return old - needed, {path for path, entry in self.strays.items() if entry.modified_s < before_s}


def references(manifest: Manifest) -> set[str]:
    """The keys that an artifact's work names, its own left out."""
    return set(re.findall(rf"\b{KEY.pattern}\b", canonical_json(manifest.work))) - {manifest.key}


def ancestry(keys: Iterable[str], named: Mapping[str, set[str]]) -> set[str]:
    """These keys and everything that they descend from."""
    found, waiting = set[str](), list(keys)
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting.extend(named.get(key, ()))
    return found


def collect_garbage(store: Store, now_s: float, older_than_days: float, dry_run: bool) -> tuple[Inventory, list[str]]:
    """Remove what nothing kept refers to, files of no artifact, and uploads that never ended, all of them old.

    Returns:
        The inventory before, and what was removed or would be: keys, paths and a line on uploads.

    Raises:
        ArtifactError: a manifest is not readable, so nobody knows what it refers to; nothing is removed then.
    """
    before_s = now_s - older_than_days * DAY_SECONDS
    inventory = Inventory.of(store)
    keys, paths = inventory.garbage(before_s)
    for key in () if dry_run else sorted(keys):
        store.delete(key)
    for path in () if dry_run else sorted(paths):
        store.remove_stray(path)
    uploads = store.drop_unfinished_uploads(before_s, dry_run)
    return inventory, [*sorted(keys), *sorted(paths), *([f"{uploads} unfinished uploads"] if uploads else [])]


def _is_record(path: str) -> bool:
    return path.endswith(f"/{MANIFEST}") and KEY.fullmatch(path.removesuffix(f"/{MANIFEST}")) is not None


def _belongs(path: str, manifest: Manifest) -> bool:
    name = path.removeprefix(f"{manifest.key}/")
    return name == MANIFEST or name.removeprefix(f"{manifest.place}/" if manifest.place else "") in manifest.files
