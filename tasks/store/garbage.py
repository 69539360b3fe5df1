"""The content of a store, the references between its artifacts, and the artifacts that nothing kept refers to.

References are the keys that an artifact's work names: a child's work names its library blocks, and theirs name the
tokens they were trained on. Artifacts of the stages in INTERMEDIATE_STAGES are kept only while another kept artifact
descends from them. All others (children, searches, reports) are kept, with everything that they descend from.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tasks.store.bucket import FileStatus
from tasks.store.manifest import KEY, MANIFEST, Manifest
from tasks.store.references import reachable, references
from tasks.store.store import Store
from tasks.store.stored_targets import TARGETS

INTERMEDIATE_STAGES = frozenset({"tokens", "importance", "bld", "gradients", "score", "cost", "evaluation"})
DAY_SECONDS = 86_400.0


class ArtifactSize(NamedTuple):
    """Bytes of an artifact, and when its record was written (epoch seconds)."""

    size_bytes: int
    modified_s: float


class Inventory(NamedTuple):
    """Everything in a store: artifacts and manifests by key, and files that belong to no artifact by path."""

    artifacts: dict[str, ArtifactSize]
    strays: dict[str, FileStatus]
    manifests: dict[str, Manifest]

    @classmethod
    def of(cls, store: Store) -> "Inventory":
        """List a whole store and read every manifest.

        Raises:
            ArtifactError: a manifest is not readable, so its references are not known.
        """
        listing = store.listing()
        records = {path.removesuffix(f"/{MANIFEST}"): entry for path, entry in listing.items() if _is_record(path)}
        manifests = store.manifests(records)
        sizes, strays = dict.fromkeys(records, 0), {}
        for path, entry in listing.items():
            key = "/".join(path.split("/")[:3])
            if key in manifests and _belongs(path, manifests[key]):
                sizes[key] += entry.size_bytes
            elif not path.startswith(f"{TARGETS}/"):
                strays[path] = entry
        artifacts = {key: ArtifactSize(sizes[key], entry.modified_s) for key, entry in records.items()}
        return cls(artifacts, strays, manifests)

    def references(self) -> dict[str, set[str]]:
        """By key: the artifacts of this store that its work names."""
        return {key: references(manifest) & self.artifacts.keys() for key, manifest in self.manifests.items()}

    def referrers(self) -> dict[str, set[str]]:
        """By key: the artifacts whose work names it."""
        referrers: defaultdict[str, set[str]] = defaultdict(set)
        for key, sources in self.references().items():
            for source in sources:
                referrers[source].add(key)
        return referrers

    def unreferenced(self) -> set[str]:
        """Artifacts that no kept artifact descends from."""
        kept = [key for key in self.artifacts if key.split("/")[0] not in INTERMEDIATE_STAGES]
        return self.artifacts.keys() - _with_ancestors(kept, self.references())

    def garbage(self, before_s: float) -> tuple[set[str], set[str]]:
        """Keys of unreferenced artifacts, and paths of stray files, all written before `before_s` (epoch seconds).

        An unreferenced artifact written later is kept, with what it descends from: a run may be about to use them.
        """
        old = {key for key in self.unreferenced() if self.artifacts[key].modified_s < before_s}
        kept = _with_ancestors(self.artifacts.keys() - old, self.references())
        return old - kept, {path for path, entry in self.strays.items() if entry.modified_s < before_s}


def collect_garbage(store: Store, now_s: float, older_than_days: float, dry_run: bool) -> tuple[Inventory, list[str]]:
    """Remove old unreferenced artifacts, stray files and unfinished uploads.

    Args:
        store: what to clean.
        now_s: the present time (epoch seconds).
        older_than_days: what is younger stays.
        dry_run: remove nothing, and return what would be removed.

    Returns:
        The inventory before, and what was removed or would be: keys, paths and a line on uploads.

    Raises:
        ArtifactError: a manifest is not readable, so its references are not known; nothing is removed.
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


def _with_ancestors(keys: Iterable[str], references: Mapping[str, set[str]]) -> set[str]:
    """These keys and all that they descend from."""
    return reachable(keys, lambda frontier: (source for key in frontier for source in references[key]))


def _is_record(path: str) -> bool:
    return path.endswith(f"/{MANIFEST}") and KEY.fullmatch(path.removesuffix(f"/{MANIFEST}")) is not None


def _belongs(path: str, manifest: Manifest) -> bool:
    """Whether a file of the listing is the manifest, or one of its files or of those beside them in a bucket."""
    name = path.removeprefix(f"{manifest.key}/")
    if manifest.place:
        return name == MANIFEST or name.startswith(f"{manifest.place}/")
    return name == MANIFEST or name in manifest.files
