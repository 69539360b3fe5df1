"""Runs `puzzle run` as a user does: in a separate process and directory, with an empty store."""

import os
import subprocess
import sys
import time
from pathlib import Path

from puzzle_core.errors import PuzzleError
from puzzle_core.report.report import INPUTS
from puzzle_core.report.report_inputs import ReportInputs
from tasks.store.manifest import Manifest
from tasks.store.store import Store

REPOSITORY = Path(__file__).parent.parent


def run_puzzle(spec: Path, overrides: list[str], place: Path) -> float:
    """Run the command with `place` as its working directory, its progress going to stderr.

    Returns:
        Seconds from start to exit.

    Raises:
        PuzzleError: it did not end well.
    """
    changes = [part for override in overrides for part in ("--set", override)]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(place.resolve() / "prefect-home")  # no profile of the user's
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "flows.cli", "run", str(spec.resolve()), *changes]
    started = time.monotonic()
    ended = subprocess.run(command, cwd=place, env=environment, stdout=sys.stderr, check=False)
    if ended.returncode:
        raise PuzzleError(f"`puzzle run {spec} {' '.join(changes)}` ended with {ended.returncode}: see above")
    return time.monotonic() - started


def open_store(place: Path) -> Store:
    """The store that a run in `place` left."""
    return Store(str(place / ".puzzle/store"), place / ".puzzle/scratch/store-cache")


def manifests(store: Store, stage: str) -> list[Manifest]:
    """All artifacts of a stage, the oldest first."""
    return sorted((store.manifest(key) for key in store.keys(stage)), key=lambda manifest: manifest.made_at)


def last_report(store: Store) -> ReportInputs:
    """What the newest report in the store shows."""
    return ReportInputs.read(store.fetch(manifests(store, "report")[-1].key) / INPUTS)
