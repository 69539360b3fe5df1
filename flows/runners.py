"""The choice of `runtime.task_runner`: threads of the run (workers.py), or processes under Dask (cluster.py)."""

from typing import Any

from prefect.task_runners import TaskRunner

from flows.workers import Workers
from puzzle_core.errors import PuzzleError
from tasks.site import Site


def task_runner(site: Site) -> TaskRunner[Any]:
    """The task runner that the site's specification names."""
    if site.runtime.task_runner == "threads":
        return Workers(max_workers=site.workers)  # type: ignore[return-value]
    from flows.cluster import ClusterWorkers

    return ClusterWorkers.of(site)


def check_installed(site: Site) -> None:
    """See that the chosen task runner can be had.

    Raises:
        PuzzleError: it is not installed.
    """
    if site.runtime.task_runner == "dask":
        try:
            import prefect_dask  # noqa: F401
        except ImportError as error:
            raise PuzzleError(
                f"runtime.task_runner is dask, which is not installed here ({error}): install this project with its "
                "extra `dask` (pip install '.[dask]'), or set runtime.task_runner to threads"
            ) from error


def check_cluster(site: Site) -> None:
    """See that a cluster named by its address can do this run's work.

    Raises:
        PuzzleError: it cannot be reached, or a worker of it lacks something.
    """
    if site.runtime.dask_address:
        from flows.cluster import check_workers

        check_workers(site, site.runtime.dask_address)
