"""`puzzle lineage`: a child's lineage as MLflow has it, and which of its artifacts the store lacks."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.arguments import MLFLOW_URI, MlflowUri, NamedChild
from puzzle_core.errors import ArtifactError, SpecError

if TYPE_CHECKING:
    from tasks.tracking.lineage_tree import Step

MOST_NAMED = 5
WIDTH_OF_PIPES = 200


def lineage(
    child: NamedChild,
    /,
    *,
    mlflow: MlflowUri = MLFLOW_URI,
    store: Annotated[
        str | None, Parameter(metavar="URL", help="Store to check [default: the one that MLflow names].")
    ] = None,
) -> None:
    """Print the tree of steps from the parent to the child.

    Raises:
        SpecError: MLflow has no such child.
        ArtifactError: the store lacks artifacts; raised after the tree is printed.
    """
    mlflow = known_database(mlflow)
    from tasks.tracking.lineage_tree import lineage_of, missing

    steps = lineage_of(mlflow, child)
    gone, unreachable = missing(steps, store)
    _print_tree(steps, gone)
    for url, reason in unreachable.items():
        sys.stdout.write(f"the store {url} was not checked: {reason}\n")
    if gone:
        keys = {key for keys_of_step in gone.values() for key in keys_of_step}
        raise ArtifactError(f"the store lacks {len(keys)} of the artifacts: run their specification to make them again")
    if not unreachable:
        sys.stdout.write(f"all {len({a.key for step in steps for a in step.artifacts})} artifacts are in the store\n")


def known_database(uri: str) -> str:
    """The tracking URI of an option, or of the environment; an SQLite file that does not exist is refused.

    MLflow would create the file.

    Raises:
        SpecError: names the file.
    """
    from tasks.tracking.place import tracking_uri

    uri = tracking_uri(uri)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        raise SpecError(f"there is no MLflow database {file}: name the tracking URI of the runs with --mlflow")
    return uri


def _print_tree(steps: list["Step"], gone: dict[str, list[str]]) -> None:
    """Print every step under the first of its sources; its text names the other sources."""
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


def _lines(step: "Step", others: list["Step"], gone: list[str]) -> list[str]:
    last = max(step.artifacts, key=lambda artifact: (artifact.key == step.key, artifact.made_at), default=None)
    made = f"made {last.made_at} by {last.made_by}" if last else f"recorded {step.noted_at}"
    lines = [_title(step), f"{step.key}  {made}", *([step.headline] if step.headline else [])]
    lines += [f"registered as {version}" for version in step.registered]
    if step.path:
        lines.append(f"{step.path}{'' if Path(step.path).exists() else '  (not on this machine)'}")
    if others:
        lines.append(f"also from {', '.join(map(_title, others))}")
    lines += [f"MISSING in the store: {key}" for key in gone[:MOST_NAMED]]
    if len(gone) > MOST_NAMED:
        lines.append(f"MISSING in the store: {len(gone) - MOST_NAMED} more")
    return lines


def _title(step: "Step") -> str:
    return step.kind if step.kind == step.name else f"{step.kind} {step.name}"
