"""What all flows share: planning a run, submitting missing work, and waiting for it with progress."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

from prefect import Flow, Task
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture

from flows.run_graph import INPUTS, call_task, start_graph, submit_task
from flows.task_runners.choice import check_cluster, check_packages, task_runner
from puzzle_core.errors import DamagedError, PuzzleError
from puzzle_core.plan import Plan
from puzzle_core.records import Work
from puzzle_core.resources import resources
from puzzle_core.spec import RunSpec
from puzzle_core.work import BldWork, GradientsWork, ScoreWork
from tasks.runtime.context import RunContext
from tasks.runtime.disk_space import check_disk_space
from tasks.stage_progress import StageProgress
from tasks.stage_tasks import open_inputs, pack_tokens
from tasks.store.references import read_keys
from tasks.task_policies import listed
from tasks.tracking.tracking import current_run
from tasks.ui_artifacts import show_cached

log = logging.getLogger("puzzle")
ATTEMPTS = 3
"""Of a run that finds damaged artifacts (`retry_after_damage`)."""
MOST_CACHED = 2000
"""Task runs of a stage that are shown as cached: each takes about 7 ms."""
P = ParamSpec("P")
T = TypeVar("T")
# `Any` below stands for the parameters of tasks of every signature, and for the results of their futures.


def plan_run(spec: RunSpec) -> tuple[Plan, RunContext]:
    """Open the inputs, plan the work, and check disks and workers.

    Returns:
        The plan, and the context of its tasks, which open the same commit of a hub's parent.

    Raises:
        PuzzleError: the parent, the texts or the target are invalid, a disk is too small, or a worker lacks something.
    """
    start_graph()
    context = RunContext.of(spec)
    check_packages(spec, context)
    plan = Plan(spec, call_task(open_inputs, INPUTS, context=context, spec=spec))
    _log_auto_dtype(spec, plan, context)
    context = context.at_commit(plan.inputs.parent_commit)
    context.drop_finished_checkpoints()
    store = context.store()
    done = [store.keys(work.stage) for work in (BldWork, GradientsWork, ScoreWork)]
    needed = resources(plan, done=set().union(*done))
    check_disk_space(context, needed.scratch_bytes, needed.store_bytes * (1 + len(spec.rounds)))
    if needed.scratch_bytes:
        check_cluster(context, plan.inputs.parent)
    return plan, context


def _log_auto_dtype(spec: RunSpec, plan: Plan, context: RunContext) -> None:
    """Log what `auto` is here, and warn where the store has trained variants in the other type alone."""
    if not spec.auto_parts:
        return
    here, stored = plan.inputs.auto_dtype, context.store().keys(BldWork.stage)
    parts = ", ".join(f"{part}.dtype" for part in spec.auto_parts)
    log.info("auto is %s on this machine: %s", here, parts)
    elsewhere = "float32" if here == "bfloat16" else "bfloat16"
    other = Plan(spec, plan.inputs.model_copy(update={"auto_dtype": elsewhere}))
    found = sum(work.key in stored for work in other.all_bld())
    if found and not any(work.key in stored for work in plan.all_bld()):
        log.warning(
            "the store has %d variants of this specification in %s, from a machine where auto is that, and none in %s; "
            "this run trains its own. To use those: --set bld.dtype=%s",
            *(found, elsewhere, here, elsewhere),
        )


def side_by_side(flow: Flow[P, T], context: RunContext, tasks: int = 0) -> Flow[P, T]:
    """The flow with one task slot per core or GPU of this machine, or per worker of the run's cluster.

    Threads hold at least `tasks` tasks at a time: tasks that share what they load, and take turns to compute.
    """
    return flow.with_options(task_runner=task_runner(context, tasks))


def ensure(task: Task[Any, str], work: Work, context: RunContext, after: Iterable[str] = (), **arguments: Any) -> str:
    """Run one task and wait for it; where the store has its artifact, Prefect shows the task as cached.

    In Prefect's graph it comes after the tasks that made what `work` names, and after those that made `after`.
    """
    try:
        names = [*read_keys(work), *after]
        run = _with_timeout(task, context)
        return call_task(run, work.key, names, work=work, context=_tracked(context), **arguments)
    except TimeoutError as error:
        raise timeout_error(f"{task.name} ({work.key})", error) from error


def submit(
    task: Task[Any, str], work: Work, context: RunContext, after: Iterable[str] = (), **arguments: Any
) -> PrefectFuture[str]:
    """Submit one task whose artifact the store lacks; `after` as in `ensure`."""
    names = [*read_keys(work), *after]
    return submit_task(_with_timeout(task, context), work.key, names, work=work, context=_tracked(context), **arguments)


def show_stored(
    stage: str, task: Task[Any, str], works: Sequence[Work], plan: Plan, context: RunContext, **arguments: Any
) -> None:
    """Show works that the store has: each as a task that is cached, or more than MOST_CACHED of them in one table."""
    if len(works) > MOST_CACHED:
        show_cached(stage, plan, works, context)
        return
    with listed({work.key for work in works}):
        for work in works:
            ensure(task, work, context, **arguments)


def ensure_tokens(plan: Plan, context: RunContext, *splits: str) -> None:
    """Pack splits of the texts.

    Raises:
        DataError: the texts have fewer tokens than a split needs.
    """
    for split in splits:
        ensure(pack_tokens, plan.tokens(split), context.of_first, texts=plan.texts(split))


def retry_after_damage(spec: RunSpec, act: Callable[[], T]) -> T:
    """Call `act`, and again, up to ATTEMPTS times, after it finds a damaged artifact, which the store then removes.

    Raises:
        DamagedError: `runtime.on_corruption` is `refuse`, or every attempt found a damaged artifact.
    """
    for remaining in reversed(range(ATTEMPTS)):
        try:
            return act()
        except DamagedError as error:
            if spec.runtime.on_corruption == "refuse" or not remaining:
                raise
            log.warning("%s\nthe run starts again; it computes only what the store lacks", error)
    raise AssertionError("unreachable")


def wait_all(
    what: str,
    futures: Iterable[PrefectFuture[Any]],
    done_before: int = 0,
    total: int | None = None,
    progress: StageProgress | None = None,
) -> None:
    """Wait for all futures and show progress; failures are raised when every future has ended.

    Args:
        what: the name of the tasks in log lines and errors.
        futures: the tasks' futures.
        done_before: tasks of the same kind that were done before.
        total: all tasks of this kind; the number of futures by default.
        progress: where the progress of all these tasks is shown.

    Raises:
        PuzzleError: tasks failed; its text has one line per distinct failure. A DamagedError if one of them is.
    """
    waiting = list(futures)
    total = total or len(waiting)
    failed: list[PuzzleError] = []
    for number, future in enumerate(waiting, start=1):
        try:
            future.result()
        except PuzzleError as error:
            failed.append(error)
        except TimeoutError as error:
            failed.append(timeout_error(_name_of(future), error))
        if progress:
            progress.show(done_before + number, total)
    if failed:
        damaged = any(isinstance(error, DamagedError) for error in failed)
        message = f"{len(failed)} of {total} {what} tasks failed:\n" + "\n".join(_distinct(failed))
        raise (DamagedError if damaged else PuzzleError)(message)


def _distinct(errors: Iterable[PuzzleError]) -> list[str]:
    """The distinct messages of errors with their counts: an unreachable store fails every task with one message."""
    counts = Counter(map(str, errors))
    return [message if count == 1 else f"{message} ({count} times)" for message, count in counts.items()]


def _tracked(context: RunContext) -> RunContext:
    """The context with the id of the present MLflow run, which the manifests of artifacts record."""
    run = current_run()
    return context.model_copy(update={"mlflow_run": run.run_id}) if run else context


def _with_timeout(task: Task[Any, str], context: RunContext) -> Task[Any, str]:
    """The task with the run's timeout."""
    seconds = context.runtime.task_timeout_s
    return task if seconds is None else task.with_options(timeout_seconds=seconds)


def timeout_error(name: str, error: TimeoutError) -> PuzzleError:
    """The error of a task that ran longer than `runtime.task_timeout_s`."""
    return PuzzleError(
        f"{name}: {error} The task is stuck, or runtime.task_timeout_s is too short for it; run again to continue from "
        "its last checkpoint"
    )


def _name_of(future: PrefectFuture[Any]) -> str:
    """The name of a task run, or its id where the server has no name yet."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_task_run(future.task_run_id).name
    except Exception:
        return f"task run {future.task_run_id}"
