"""The provenance of a child for its model card: which run made it, and its evaluations beside the parent's."""

from puzzle_core.export.card import Provenance
from puzzle_core.work import EvaluationRecord, GkdWork
from tasks.store.manifest import Manifest
from tasks.store.store import Store


def child_provenance(
    store: Store, key: str, evaluation: EvaluationRecord | None, parent_evaluation: EvaluationRecord | None
) -> Provenance:
    """The provenance of a child, trained (GKD) or only assembled, with these evaluations."""
    manifest = store.manifest(key)
    return Provenance(
        key=manifest.key,
        made_by=manifest.made_by,
        made_at=manifest.made_at,
        parent=manifest.work["parent"],
        distilled_tokens=_distilled_tokens(store, manifest),
        evaluation=evaluation,
        parent_evaluation=parent_evaluation,
    )


def stored_provenance(store: Store, key: str) -> Provenance:
    """The provenance of a child, with an evaluation from the store and the parent's on the same tokens, if any."""
    manifest = store.manifest(key)
    evaluations = list(store.manifests(store.keys("evaluation")).values())
    of_child = next((entry for entry in evaluations if entry.work["child"] == key), None)
    tokens = of_child.work["tokens"] if of_child else None
    same_tokens = {"parent": manifest.work["parent"], "child": None, "tokens": tokens}
    of_parent = next((entry for entry in evaluations if same_tokens.items() <= entry.work.items()), None)
    return child_provenance(store, key, _record(of_child), _record(of_parent))


def _distilled_tokens(store: Store, manifest: Manifest) -> int | None:
    """Tokens of all distillations that gave a child; None for one that was only assembled."""
    if "tokens" not in manifest.record:
        return None
    before = manifest.work["child"]
    if not before.startswith(f"{GkdWork.stage}/") and store.has(before):  # it was assembled from this parent
        before = store.manifest(before).work["parent"]
    was_distilled = before.startswith(f"{GkdWork.stage}/") and store.has(before)
    earlier = _distilled_tokens(store, store.manifest(before)) if was_distilled else 0
    return int(manifest.record["tokens"]) + (earlier or 0)


def _record(manifest: Manifest | None) -> EvaluationRecord | None:
    return EvaluationRecord.model_validate(manifest.record) if manifest else None
