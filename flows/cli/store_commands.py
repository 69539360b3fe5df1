"""`puzzle store`: what the artifact store holds, whether it is whole, and what could go."""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from puzzle_core.errors import DamagedError
from puzzle_core.spec import RuntimeSpec

STORE_HELP = "what the artifact store holds, whether it is whole, and what could go"
LABELS = ("split", "layer", "variant", "block", "name", "traffic")
"""Keys of a work that tell one artifact of a stage from another."""


def add_store_commands(store: argparse.ArgumentParser) -> None:
    """Give `puzzle store` its subcommands."""
    commands = store.add_subparsers(required=True, metavar="ACTION")

    def command(name: str, run: Callable[[Any], None], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        default = RuntimeSpec().store
        added.add_argument("--store", default=default, help="directory or s3://bucket/prefix (default %(default)s)")
        return added

    listed = command(
        "ls", _list, "artifacts by stage, or those of one stage: key, size, when, and how many refer to it"
    )
    listed.add_argument("stage", nargs="?", metavar="STAGE", help="for instance bld")
    shown = command("show", _show, "one artifact: what was asked, its files, what it refers to and what refers to it")
    shown.add_argument("key", metavar="KEY", help="stage/vN/digest")
    verified = command("verify", _verify, "read every byte and compare with the digests; exit code 1 if one is wrong")
    verified.add_argument("stage", nargs="?", default="", metavar="STAGE", help="only these")
    collected = command("gc", _collect, "remove what no child, search or report descends from, if it is old")
    collected.add_argument("--dry-run", action="store_true", help="only say what would go")
    collected.add_argument(
        "--older-than",
        type=float,
        default=30.0,
        metavar="DAYS",
        help="leave what is younger, for a run may be at it (default %(default)s)",
    )


def _open(options: Any) -> Any:
    from tasks.store.store import Store

    return Store.of(RuntimeSpec(store=options.store))


def _list(options: Any) -> None:
    from tasks.store.garbage import Inventory

    store = _open(options)
    found = Inventory.of(store)
    if options.stage:
        _list_stage(found, options.stage)
        return
    unreferenced, stages = found.unreferenced(), defaultdict(list)
    for key in found.artifacts:
        stages[key.split("/")[0]].append(key)
    _print(f"{'stage':<14}{'artifacts':>10}{'MiB':>14}{'without use':>13}{'MiB':>14}")
    for stage, keys in sorted(stages.items()):
        unused = unreferenced & set(keys)
        _print(f"{stage:<14}{len(keys):>10}{_mib(found, keys):>14}{len(unused):>13}{_mib(found, unused):>14}")
    total = f"{'all':<14}{len(found.artifacts):>10}{_mib(found, found.artifacts):>14}"
    _print(f"{total}{len(unreferenced):>13}{_mib(found, unreferenced):>14}")
    if found.strays:
        size = sum(entry.size_bytes for entry in found.strays.values())
        _print(
            f"and {len(found.strays)} files of no artifact, {size / 2**20:,.1f} MiB: see `puzzle store gc --dry-run`"
        )


def _list_stage(found: Any, stage: str) -> None:
    referrers = found.referrers()
    _print(f"{'key':<{len(stage) + 46}}{'MiB':>12}  {'made at':<25}  {'used by':>7}  what")
    for key in sorted(found.artifacts):
        if key.split("/")[0] == stage:
            manifest = found.manifests[key]
            used = f"{len(referrers.get(key, ())):>7}"
            _print(f"{key:<{len(stage) + 46}}{_mib(found, [key]):>12}  {manifest.made_at}  {used}  {_label(manifest)}")


def _show(options: Any) -> None:
    from puzzle_core.records import canonical_json
    from tasks.store.garbage import Inventory
    from tasks.store.manifest import check_key
    from tasks.store.references import references

    store, key = _open(options), check_key(options.key)
    manifest = store.manifest(key)
    found = Inventory.of(store)
    _print(f"{key}  {_label(manifest)}\nmade by {manifest.made_by} at {manifest.made_at}")
    _print(f"\nasked: {canonical_json(manifest.work)[:2000]}\nfound: {canonical_json(manifest.record)[:2000]}\n")
    for name, entry in manifest.files.items():
        _print(f"{entry.size_bytes:>16,} bytes  {entry.sha256[:16]}  {name}")
    for title, others in (("refers to", references(manifest)), ("used by", found.referrers().get(key, set()))):
        _print(f"\n{title}: {len(others) or 'nothing'}")
        for other in sorted(others):
            _print(f"  {other}{'' if other in found.artifacts else '  (not in the store)'}")


def _verify(options: Any) -> None:
    store = _open(options)
    keys = sorted(store.keys(options.stage))
    damaged = {key: said for key in keys if (said := store.damage(key))}
    for key, files in damaged.items():
        for name, said in files.items():
            _print(f"{key}/{name}: {said}")
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {len(keys)} artifacts in {options.store} are damaged: run with "
            "runtime.on_corruption=recompute, or delete them, to have them made again"
        )
    _print(f"{len(keys)} artifacts, every byte as it was stored")


def _collect(options: Any) -> None:
    from tasks.store.garbage import collect_garbage

    inventory, gone = collect_garbage(_open(options), time.time(), options.older_than, options.dry_run)
    for name in gone:
        _print(name)
    keys = [name for name in gone if name in inventory.artifacts]
    done = "would go" if options.dry_run else "removed"
    _print(f"{done}: {len(keys)} of {len(inventory.artifacts)} artifacts ({_mib(inventory, keys)} MiB)")


def _label(manifest: Any) -> str:
    """What an artifact is about, in a few words."""
    parts = [manifest.work[name] for name in LABELS if name in manifest.work]
    return " ".join(part if isinstance(part, str) else _plain(part) for part in parts)


def _plain(value: Any) -> str:
    return "+".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _mib(found: Any, keys: Any) -> str:
    return f"{sum(found.artifacts[key].size_bytes for key in keys) / 2**20:,.2f}"


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
