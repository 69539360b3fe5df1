"""`puzzle store`: what the artifact store holds, whether its files are intact, and which artifacts are unused."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.types import NonNegativeFloat

from flows.cli.arguments import STORE, StoreUrl
from puzzle_core.errors import DamagedError
from puzzle_core.spec import RuntimeSpec

if TYPE_CHECKING:
    from tasks.store.garbage import Inventory
    from tasks.store.manifest import Manifest
    from tasks.store.store import Store

LABELS = ("split", "layer", "variant", "block", "name", "traffic")
"""Keys of a work that tell one artifact of a stage from another."""

app = App(name="store")


@app.command(name="ls")
def list_artifacts(
    stage: Annotated[str | None, Parameter(help="A stage, for instance bld; all stages by default.")] = None,
    /,
    *,
    store: StoreUrl = STORE,
) -> None:
    """List artifacts by stage, or those of one stage: key, size, time, and how many artifacts refer to it."""
    from tasks.store.garbage import Inventory

    inventory = Inventory.of(_open(store))
    if stage:
        _list_stage(inventory, stage)
        return
    unreferenced, stages = inventory.unreferenced(), defaultdict(list)
    for key in inventory.artifacts:
        stages[key.split("/")[0]].append(key)
    _print(f"{'stage':<14}{'artifacts':>10}{'MiB':>14}{'unused':>13}{'MiB':>14}")
    for name, keys in sorted(stages.items()):
        unused = unreferenced & set(keys)
        _print(f"{name:<14}{len(keys):>10}{_mib(inventory, keys):>14}{len(unused):>13}{_mib(inventory, unused):>14}")
    total = f"{'all':<14}{len(inventory.artifacts):>10}{_mib(inventory, inventory.artifacts):>14}"
    _print(f"{total}{len(unreferenced):>13}{_mib(inventory, unreferenced):>14}")
    if inventory.strays:
        size = sum(entry.size_bytes for entry in inventory.strays.values())
        _print(
            f"and {len(inventory.strays)} files of no artifact, {size / 2**20:,.1f} MiB: see "
            "`puzzle store gc --dry-run`"
        )


@app.command
def show(key: Annotated[str, Parameter(help="stage/vN/digest")], /, *, store: StoreUrl = STORE) -> None:
    """Show one artifact: its work, its record, its files, what it refers to and what refers to it."""
    from puzzle_core.records import canonical_json
    from tasks.store.garbage import Inventory
    from tasks.store.manifest import check_key
    from tasks.store.references import references

    opened, checked = _open(store), check_key(key)
    manifest = opened.manifest(checked)
    inventory = Inventory.of(opened)
    _print(f"{checked}  {_label(manifest)}\nmade by {manifest.made_by} at {manifest.made_at}")
    _print(f"\nwork: {canonical_json(manifest.work)[:2000]}\nrecord: {canonical_json(manifest.record)[:2000]}\n")
    for name, entry in manifest.files.items():
        _print(f"{entry.size_bytes:>16,} bytes  {entry.sha256[:16]}  {name}")
    referrers = inventory.referrers().get(checked, set())
    for title, keys in (("refers to", references(manifest)), ("used by", referrers)):
        _print(f"\n{title}: {len(keys) or 'nothing'}")
        for other in sorted(keys):
            _print(f"  {other}{'' if other in inventory.artifacts else '  (not in the store)'}")


@app.command
def verify(
    stage: Annotated[str, Parameter(help="Only this stage.", show_default=False)] = "",
    /,
    *,
    store: StoreUrl = STORE,
) -> None:
    """Read every byte and compare it with the digests; exit code 1 if one differs.

    Raises:
        DamagedError: a file is not what was stored; raised after all damaged files are printed.
    """
    opened = _open(store)
    keys = sorted(opened.keys(stage))
    damaged = {key: files for key in keys if (files := opened.damage(key))}
    for key, files in damaged.items():
        for name, damage in files.items():
            _print(f"{key}/{name}: {damage}")
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {len(keys)} artifacts in {store} are damaged: run with "
            "runtime.on_corruption=recompute, or delete them, to have them made again"
        )
    _print(f"{len(keys)} artifacts, every byte as it was stored")


@app.command
def gc(
    *,
    dry_run: Annotated[bool, Parameter(help="Only print what would be removed.")] = False,
    older_than: Annotated[
        NonNegativeFloat, Parameter(metavar="DAYS", help="Keep younger artifacts: a run may be about to use them.")
    ] = 30.0,
    store: StoreUrl = STORE,
) -> None:
    """Remove old artifacts that no child, search or report descends from."""
    from tasks.store.garbage import collect_garbage

    inventory, removed = collect_garbage(_open(store), time.time(), older_than, dry_run)
    for name in removed:
        _print(name)
    keys = [name for name in removed if name in inventory.artifacts]
    verb = "would remove" if dry_run else "removed"
    _print(f"{verb}: {len(keys)} of {len(inventory.artifacts)} artifacts ({_mib(inventory, keys)} MiB)")


def _open(url: str) -> "Store":
    from tasks.store.store import Store

    return Store.of(RuntimeSpec(store=url))


def _list_stage(inventory: "Inventory", stage: str) -> None:
    referrers = inventory.referrers()
    _print(f"{'key':<{len(stage) + 46}}{'MiB':>12}  {'made at':<25}  {'used by':>7}  what")
    for key in sorted(inventory.artifacts):
        if key.split("/")[0] == stage:
            manifest = inventory.manifests[key]
            row = f"{key:<{len(stage) + 46}}{_mib(inventory, [key]):>12}  {manifest.made_at}"
            _print(f"{row}  {len(referrers.get(key, ())):>7}  {_label(manifest)}")


def _label(manifest: "Manifest") -> str:
    """What an artifact is about, in a few words."""
    parts = [manifest.work[name] for name in LABELS if name in manifest.work]
    return " ".join("+".join(map(str, part.values())) if isinstance(part, dict) else str(part) for part in parts)


def _mib(inventory: "Inventory", keys: Iterable[str]) -> str:
    return f"{sum(inventory.artifacts[key].size_bytes for key in keys) / 2**20:,.2f}"


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
