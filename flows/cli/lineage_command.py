"""`puzzle lineage`: where a child comes from, as MLflow has it, and what of it is gone from the store."""

import argparse
import sys
from pathlib import Path
from typing import Any

from puzzle_core.errors import ArtifactError, SpecError
from puzzle_core.spec import RuntimeSpec

LINEAGE_HELP = "where a child comes from, from its parent down to exported files, and what of it is gone from the store"
MOST_NAMED = 5
WIDTH_OF_PIPES = 200


def add_lineage_options(lineage: argparse.ArgumentParser) -> None:
    """Give `puzzle lineage` its options."""
    lineage.add_argument(
        "child",
        metavar="CHILD",
        help="key, name of a specification, NAME, NAME/NUMBER or NAME@ALIAS of a registered model, or an alias",
    )
    default = RuntimeSpec().mlflow_uri
    lineage.add_argument("--mlflow", default=default, metavar="URI", help="tracking URI (default %(default)s)")
    lineage.add_argument("--store", help="look for the artifacts here (default where MLflow says that they are)")


def lineage(options: Any) -> None:
    """Run `puzzle lineage`.

    Raises:
        SpecError: MLflow knows no such child.
        ArtifactError: artifacts are gone from the store; the tree was printed nevertheless.
    """
    check_database(options.mlflow)
    from tasks.tracking.lineage_tree import lineage_of, missing

    steps = lineage_of(options.mlflow, options.child)
    gone, unreachable = missing(steps, options.store)
    _print_tree(steps, gone)
    for url, said in unreachable.items():
        sys.stdout.write(f"the store {url} was not looked at: {said}\n")
    if gone:
        keys = {key for found in gone.values() for key in found}
        raise ArtifactError(
            f"{len(keys)} artifacts are gone from the store: run their specification to make them again"
        )
    if not unreachable:
        sys.stdout.write(f"all {len({a.key for step in steps for a in step.artifacts})} artifacts are in the store\n")


def check_database(uri: str) -> None:
    """Refuse a database that is not there: to look must not make one.

    Raises:
        SpecError: names the file.
    """
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        raise SpecError(f"there is no MLflow database {file}: name the tracking URI of the runs with --mlflow")


def _print_tree(steps: Any, gone: dict[str, list[str]]) -> None:
    """Every step under the first of its sources; the others are named."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    known = {step.key: step for step in steps}
    trees: dict[str, Tree] = {}
    roots = []
    for step in steps:
        sources = [key for key in step.sources if key in known]
        label = Text("\n".join(_lines(step, [known[key] for key in sources[1:]], gone.get(step.key, []))))
        label.stylize("bold", 0, len(_title(step)))
        if sources:
            trees[step.key] = trees[sources[0]].add(label)
        else:
            trees[step.key] = Tree(label)
            roots.append(trees[step.key])
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_OF_PIPES, highlight=False)
    for root in roots:
        console.print(root)


def _lines(step: Any, others: list[Any], gone: list[str]) -> list[str]:
    last = max(step.artifacts, key=lambda artifact: (artifact.key == step.key, artifact.made_at), default=None)
    made = f"made {last.made_at} by {last.made_by}" if last else f"noted {step.noted_at}"
    lines = [_title(step), f"{step.key}  {made}", *([step.headline] if step.headline else [])]
    lines += [f"registered as {version}" for version in step.registered]
    if step.kind == "export":
        lines.append(f"{step.path}{'' if Path(step.path).exists() else '  (not on this machine)'}")
    if others:
        lines.append(f"also from {', '.join(map(_title, others))}")
    lines += [f"GONE from the store: {key}" for key in gone[:MOST_NAMED]]
    if len(gone) > MOST_NAMED:
        lines.append(f"GONE from the store: {len(gone) - MOST_NAMED} more")
    return lines


def _title(step: Any) -> str:
    return step.kind if step.kind == step.name else f"{step.kind} {step.name}"
