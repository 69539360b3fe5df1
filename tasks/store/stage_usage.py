"""What artifacts took, from their manifests, summed by stage."""

from collections import defaultdict
from collections.abc import Iterable

from puzzle_core.report.report_inputs import StageUsage
from tasks.store.manifest import Manifest
from tasks.store.store import Store


def usage_by_stage(store: Store, keys: Iterable[str]) -> tuple[StageUsage, ...]:
    """What these artifacts took, by stage, in the order in which stages began."""
    stages: defaultdict[str, list[Manifest]] = defaultdict(list)
    for manifest in sorted(store.manifests(keys).values(), key=lambda manifest: manifest.made_at):
        stages[manifest.key.partition("/")[0]].append(manifest)
    return tuple(_sum(stage, found) for stage, found in stages.items())


def _sum(stage: str, manifests: list[Manifest]) -> StageUsage:
    known = [manifest.origin.usage for manifest in manifests if manifest.origin and manifest.origin.usage]
    return StageUsage(
        stage=stage,
        artifacts=len(manifests),
        size_bytes=sum(manifest.size_bytes for manifest in manifests),
        core_seconds=sum(usage.device_seconds for usage in known if usage.kind == "core"),
        gpu_seconds=sum(usage.device_seconds for usage in known if usage.kind == "GPU"),
        unknown=len(manifests) - len(known),
    )
