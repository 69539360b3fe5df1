"""The task runner that `runtime.task_runner` names: threads (threads.py) or Dask workers (dask_cluster.py)."""

from typing import Any

from prefect.task_runners import TaskRunner

from flows.task_runners.threads import CancellableThreadTaskRunner
from puzzle_core.errors import PuzzleError
from puzzle_core.evaluation import check_lm_eval
from puzzle_core.spec import RunSpec
from tasks.runtime.context import RunContext


def task_runner(context: RunContext, tasks: int = 0) -> TaskRunner[Any]:  # Any: each runner has its own type of future
    """The task runner that the run's specification names; threads for at least `tasks` tasks at a time."""
    if context.runtime.task_runner == "threads":
        return CancellableThreadTaskRunner(max_workers=max(tasks, context.workers))  # type: ignore[return-value]
    from flows.task_runners.dask_cluster import ClusterTaskRunner

    return ClusterTaskRunner.of(context)


def check_packages(spec: RunSpec, context: RunContext) -> None:
    """Check that the optional packages are installed that a run needs: for its task runner and its evaluation.

    Raises:
        PuzzleError: one is not installed.
    """
    check_lm_eval(spec.evaluation)
    if context.runtime.task_runner == "dask":
        try:
            import prefect_dask  # noqa: F401
        except ImportError as error:
            raise PuzzleError(
                f"runtime.task_runner is dask, which is not installed here ({error}): install this project with its "
                "extra `dask` (pip install '.[dask]'), or set runtime.task_runner to threads"
            ) from error


def check_cluster(context: RunContext, parent: str) -> None:
    """Check that the cluster at `runtime.dask_address`, if there is one, can run this run's tasks.

    Args:
        context: the run's context.
        parent: digest of the parent.

    Raises:
        PuzzleError: the cluster cannot be reached, or one of its workers lacks something.
    """
    if context.runtime.dask_address:
        from flows.task_runners.dask_cluster import check_workers

        check_workers(context, context.runtime.dask_address, parent)
