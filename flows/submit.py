"""What all flows share: planning a run, submitting what the store lacks, and waiting with progress."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prefect import Flow, Task
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.results import get_result_store

from flows.task_runners.choice import check_cluster, check_installed, task_runner
from puzzle_core.errors import DamagedError, PuzzleError
from puzzle_core.plan import Plan
from puzzle_core.records import Work
from puzzle_core.spec import RunSpec
from puzzle_core.work import BldWork, ScoreWork
from tasks.runtime.context import RunContext
from tasks.runtime.disk_space import check_disk_space
from tasks.stage_tasks import open_inputs, pack_tokens
from tasks.task_policies import cache_key
from tasks.ui_artifacts import ProgressArtifact

log = logging.getLogger("puzzle")
PROGRESS_SECONDS = 5.0
MENDINGS = 3
T = TypeVar("T")


def plan_run(spec: RunSpec, context: RunContext) -> Plan:
    """Open the inputs, plan the work, and see that disks and workers can do it; bad input is refused here.

    Raises:
        PuzzleError: what is wrong, and what to do.
    """
    check_installed(context)
    plan = Plan(spec, open_inputs(context, spec.data, spec.target))
    context.drop_finished_checkpoints()
    store = context.store()
    volume = plan.volume(store.keys(BldWork.stage) | store.keys(ScoreWork.stage))
    check_disk_space(context, volume.scratch_bytes, volume.store_bytes)
    if volume.scratch_bytes:
        check_cluster(context)
    return plan


def side_by_side(flow: Flow[Any, Any], context: RunContext) -> Flow[Any, Any]:
    """The flow with as many task slots as the site has cores or GPUs, or as its cluster has."""
    return flow.with_options(task_runner=task_runner(context))


def ensure(task: Task[Any, str], work: Work, context: RunContext, **arguments: Any) -> str:
    """Run one task now unless its artifact is there already; Prefect then shows it as cached."""
    there = context.store().has(work.key)
    if there:
        mark_cached(task, work)
    fresh = _within(task, context, refresh=not there)
    try:
        return fresh(work=work, context=context, **arguments)
    except TimeoutError as error:
        raise timeout_error(f"{task.name} ({work.key})", error) from error


def submit(task: Task[Any, str], work: Work, context: RunContext, **arguments: Any) -> PrefectFuture[str]:
    """Submit one task whose artifact is missing."""
    return _within(task, context, refresh=True).submit(work=work, context=context, **arguments)


def ensure_tokens(plan: Plan, context: RunContext, *splits: str) -> None:
    """Pack splits of the texts; too few tokens are refused here."""
    for split in splits:
        work = plan.tokens(split)
        train = work.texts == plan.inputs.train_texts
        sources = plan.spec.data.train_texts if train else plan.spec.data.held_out_texts
        ensure(pack_tokens, work, context, sources=sources)


def retry_after_damage(spec: RunSpec, act: Callable[[], T]) -> T:
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


def wait_all(
    what: str,
    futures: Iterable[PrefectFuture[Any]],
    done_before: int = 0,
    total: int | None = None,
    bar: ProgressArtifact | None = None,
) -> None:
    """Wait for all futures, show progress now and then, and raise what failed once the others are finished.

    Raises:
        PuzzleError: one line per kind of failure; a DamagedError where one was.
    """
    waiting = list(futures)
    total, logged = total or len(waiting), time.monotonic()
    failed: list[PuzzleError] = []
    for number, future in enumerate(waiting, start=1):
        try:
            future.result()
        except PuzzleError as error:
            failed.append(error)
        except TimeoutError as error:
            failed.append(timeout_error(_name_of(future), error))
        if bar:
            bar.show(done_before + number, total)
        if time.monotonic() - logged > PROGRESS_SECONDS:
            log.info("%s: %d of %d", what, done_before + number, total)
            logged = time.monotonic()
    if failed:
        damaged = any(isinstance(error, DamagedError) for error in failed)
        said = f"{len(failed)} of {total} {what} tasks failed:\n" + "\n".join(_each_once(failed))
        raise (DamagedError if damaged else PuzzleError)(said)


def _each_once(errors: Iterable[PuzzleError]) -> list[str]:
    """What errors say: a store that is away says the same of every task."""
    return [said if times == 1 else f"{said} ({times} times)" for said, times in Counter(map(str, errors)).items()]


def mark_cached(task: Task[Any, str], work: Work) -> None:
    """Let Prefect know of an artifact that the store has and this Prefect never saw made."""
    results, key = get_result_store().update_for_task(task, _sync=True), cache_key(work)
    if not results.exists(key):
        results.write(work.key, key=key)


def _within(task: Task[Any, str], context: RunContext, refresh: bool) -> Task[Any, str]:
    """The task with the run's timeout; to be run whatever Prefect remembers, where the store lacks its artifact."""
    return task.with_options(refresh_cache=refresh, timeout_seconds=context.runtime.task_timeout_s)


def timeout_error(name: str, error: TimeoutError) -> PuzzleError:
    return PuzzleError(
        f"{name}: {error} The task is stuck, or runtime.task_timeout_s is too short for it; run again to go on from "
        "its last checkpoint"
    )


def _name_of(future: PrefectFuture[Any]) -> str:
    """A task's name in the UI, which the server may not know yet."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_task_run(future.task_run_id).name
    except Exception:
        return f"task run {future.task_run_id}"
