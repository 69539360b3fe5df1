"""The last search before this one for the same target and scenario, from the store."""

from puzzle_core.report.search_changes import changes_text
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.work import SearchWork
from tasks.store.manifest import Manifest
from tasks.store.store import Store


def changes_since_last(store: Store, key: str) -> str:
    """What the search of this key changed, as text; empty where it is the first for its target and scenario."""
    present = store.manifest(key)
    others = [manifest for other, manifest in _searches(store).items() if other != key and _same(manifest, present)]
    before = [manifest for manifest in others if manifest.made_at <= present.made_at]
    if not before:
        return ""
    last = max(before, key=lambda manifest: manifest.made_at)
    try:
        asked, answered = SearchWork.model_validate(last.work), SearchRecord.model_validate(last.record)
    except ValueError:  # another version of the search wrote it
        return ""
    work, record = SearchWork.model_validate(present.work), SearchRecord.model_validate(present.record)
    return changes_text(asked, answered, work, record)


def _searches(store: Store) -> dict[str, Manifest]:
    return store.manifests(sorted(store.keys(SearchWork.stage)))


def _same(manifest: Manifest, other: Manifest) -> bool:
    """Whether two searches are for one target and scenario, and both in the parent or both in children."""
    works = manifest.work, other.work
    names = [(work["target"], work["request"]["scenario"]["name"], work["base"] is None) for work in works]
    return names[0] == names[1]
