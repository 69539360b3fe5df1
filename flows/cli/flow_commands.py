"""Subcommands of a run specification: the flows, its plan, and its hardware targets."""

import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

from cyclopts import Parameter

from flows.cli.arguments import Overrides, SpecFile
from flows.services.prefect_server import PREFECT_HOME, prefect_api
from puzzle_core.errors import PuzzleError
from puzzle_core.spec_file import load_spec

log = logging.getLogger("puzzle")
TARGETS = Path("deployments/targets")


def run(spec: SpecFile, /, *, overrides: Overrides = ()) -> None:
    """Run the whole method, and print the final table."""
    run_spec, started = load_spec(spec, overrides), time.monotonic()
    with _flow_module("puzzle") as module:
        from flows.cli.report_command import print_report
        from tasks.runtime.context import RunContext

        print_report(RunContext.of(run_spec).store(), module.puzzle(run_spec))
    log.info("%s done in %.0f s; look at the run with `puzzle ui`", run_spec.name, time.monotonic() - started)


def build_library(
    spec: SpecFile,
    /,
    *,
    overrides: Overrides = (),
    layers: Annotated[
        str | None, Parameter(metavar="FIRST-LAST", help="Only these layers, where machines share a store.")
    ] = None,
) -> None:
    """Build the block library of the specification's parent, and its scores."""
    run_spec = load_spec(spec, overrides)
    with _flow_module("build_library") as module:
        module.build_library(run_spec, layers)


def search_spec(spec: Path, overrides: tuple[str, ...]) -> None:
    """Search for the specification's target and scenarios; the library must be in the store."""
    run_spec = load_spec(spec, overrides)
    with _flow_module("search_architecture") as module:
        module.search_architecture(run_spec)


def train_child(spec: SpecFile, /, *, overrides: Overrides = ()) -> None:
    """Train the architecture that the search has chosen, and evaluate it."""
    run_spec = load_spec(spec, overrides)
    with _flow_module("train_child") as module:
        module.train_child(run_spec)


def targets(
    spec: SpecFile,
    /,
    *,
    overrides: Overrides = (),
    targets: Annotated[Path, Parameter(metavar="DIR", help="Directory of target files.")] = TARGETS,
    search: Annotated[bool, Parameter(help="Search the targets without a search first.")] = False,
) -> None:
    """Print every target file of a directory with the search that the store has for it."""
    run_spec = load_spec(spec, overrides)
    from flows.cli.describe import describe_targets

    if search:
        with _flow_module("research_targets") as module:
            if not module.research_targets(run_spec, str(targets)):
                raise PuzzleError(
                    f"no target was searched: {run_spec.runtime.store} lacks scores of {run_spec.parent.path}: run "
                    f"`puzzle build-library {spec}` first"
                )
    sys.stdout.write(describe_targets(run_spec, targets))


def check(spec: SpecFile, /, *, overrides: Overrides = ()) -> None:
    """Print the plan of a specification, and compute nothing."""
    run_spec = load_spec(spec, overrides)
    from flows.cli.describe import describe_plan

    sys.stdout.write(describe_plan(run_spec))


@contextlib.contextmanager
def _flow_module(name: str) -> Iterator[ModuleType]:
    """A module of `flows`, with a Prefect API for its flows until the block ends."""
    module = f"flows.{name}"
    with prefect_api(PREFECT_HOME, module) as url:
        from flows.services.orphaned_runs import crash_orphans

        crash_orphans(url)
        yield importlib.import_module(module)
