"""What all flows share: planning a run, submitting what the store lacks, and waiting with progress."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prefect import Flow, Task
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from puzzle_core.errors import DamagedError, PuzzleError
from puzzle_core.plan import Plan
from puzzle_core.records import Work
from puzzle_core.spec import RunSpec
from puzzle_core.stages import BldWork, ScoreWork
from tasks.site import Site
from tasks.stages import open_inputs, pack_tokens

log = logging.getLogger("puzzle")
PROGRESS_SECONDS = 5.0
MENDINGS = 3
T = TypeVar("T")


def plan_run(spec: RunSpec, site: Site) -> Plan:
    """Open the inputs, plan the work, and see that the disks have room for it; bad input is refused here.

    Raises:
        PuzzleError: what is wrong, and what to do.
    """
    plan = Plan(spec, open_inputs(site, spec.data, spec.target))
    site.drop_finished_checkpoints()
    store = site.store()
    volume = plan.volume(store.keys(BldWork.stage) | store.keys(ScoreWork.stage))
    site.check_room(volume.scratch_bytes, volume.store_bytes)
    return plan


def side_by_side(flow: Flow[Any, Any], site: Site) -> Flow[Any, Any]:
    """The flow with as many task slots as the site has cores or GPUs."""
    return flow.with_options(task_runner=ThreadPoolTaskRunner(max_workers=site.workers))  # type: ignore[arg-type]


def ensure(task: Task[Any, str], work: Work, site: Site, **arguments: Any) -> str:
    """Run one task now unless its artifact is there already; Prefect then shows it as cached."""
    return _fresh(task, work, site)(work=work, site=site, **arguments)


def submit(task: Task[Any, str], work: Work, site: Site, **arguments: Any) -> PrefectFuture[str]:
    """Submit one task whose artifact is missing."""
    return task.with_options(refresh_cache=True).submit(work=work, site=site, **arguments)


def ensure_tokens(plan: Plan, site: Site, *splits: str) -> None:
    """Pack splits of the texts; too few tokens are refused here."""
    for split in splits:
        work = plan.tokens(split)
        train = work.texts == plan.inputs.train_texts
        sources = plan.spec.data.train_texts if train else plan.spec.data.held_out_texts
        ensure(pack_tokens, work, site, sources=sources)


def mending(spec: RunSpec, act: Callable[[], T]) -> T:
    """Act, and again after an artifact was found damaged and removed, which `runtime.on_corruption` has to allow.

    Raises:
        DamagedError: damage is to be refused, or there was more of it every time.
    """
    for left in reversed(range(MENDINGS)):
        try:
            return act()
        except DamagedError as error:
            if spec.runtime.on_corruption == "refuse" or not left:
                raise
            log.warning("%s\ngoing through the run once more: what is whole is not computed again", error)
    raise AssertionError("unreachable")


def wait_all(what: str, futures: Iterable[PrefectFuture[Any]], done_before: int = 0, total: int | None = None) -> None:
    """Wait for all futures, log progress now and then, and raise what failed once the others are finished.

    Raises:
        PuzzleError: one line per failed task; a DamagedError where one was.
    """
    waiting = list(futures)
    total, logged = total or len(waiting), time.monotonic()
    failed: list[PuzzleError] = []
    for number, future in enumerate(waiting, start=1):
        try:
            future.result()
        except PuzzleError as error:
            failed.append(error)
        if time.monotonic() - logged > PROGRESS_SECONDS:
            log.info("%s: %d of %d", what, done_before + number, total)
            logged = time.monotonic()
    if failed:
        damaged = any(isinstance(error, DamagedError) for error in failed)
        said = f"{len(failed)} of {total} {what} tasks failed:\n" + "\n".join(map(str, failed))
        raise (DamagedError if damaged else PuzzleError)(said)


def _fresh(task: Task[Any, str], work: Work, site: Site) -> Task[Any, str]:
    """The store is the truth: whatever Prefect remembers, an artifact that is gone is made again."""
    return task.with_options(refresh_cache=not site.store().has(work.key))
