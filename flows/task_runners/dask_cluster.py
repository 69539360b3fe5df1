"""Tasks on the processes of a Dask cluster: one started here for the time of a flow, or one that runs already.

The tasks are those of any run and share its scratch directory and its store, so a cluster of several machines needs a
shared disk for the one, and a bucket or a shared disk for the other (docs/scale.md). A worker that lacks something is
named before any work. Dask sends Python objects as pickles between its processes: its ports are for trusted networks.
"""

import logging
import urllib.request
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import distributed
from prefect.settings import PREFECT_API_URL
from prefect_dask import DaskTaskRunner

from flows.task_runners.threads import stop_thread
from puzzle_core.errors import PuzzleError
from tasks.runtime.context import RunContext

CONNECT_SECONDS = 20
logging.getLogger("distributed").setLevel(logging.WARNING)  # of every connection it would say something


class ClusterTaskRunner(DaskTaskRunner):  # type: ignore[misc]
    """One single-threaded process per task slot, or a running cluster's workers; stopped when a run is cancelled."""

    @classmethod
    def of(cls, context: RunContext) -> "ClusterTaskRunner":
        """The cluster that the site's specification asks for; connected to, or started, by the first task."""
        if context.runtime.dask_address:
            return cls(address=context.runtime.dask_address)
        own = {
            "n_workers": context.workers,
            "threads_per_worker": 1,
            "memory_limit": 0,
            "dashboard_address": "127.0.0.1:0",
        }
        return cls(cluster_class=distributed.LocalCluster, cluster_kwargs=own)

    def __enter__(self) -> "ClusterTaskRunner":
        self._submitted: list[Any] = []
        return super().__enter__()  # type: ignore[no-any-return]

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """As any task runner, and remembered."""
        future = super().submit(*args, **kwargs)
        self._submitted.append(future.wrapped_future)
        return future

    def __exit__(self, *args: Any) -> None:
        """Drop what waits and stop what runs: nothing does, unless the flow was cancelled or failed."""
        left = [future for future in self._submitted if not future.done()]
        if left:
            self.client.cancel(left)
            self.client.run(_stop, {future.key for future in left}, on_error="ignore")
        super().__exit__(*args)


def _stop(keys: set[str], dask_worker: Any) -> None:
    """Stop the threads of a worker that run these tasks."""
    with dask_worker.active_threads_lock:
        for thread, key in dask_worker.active_threads.items():
            if key in keys:
                stop_thread(thread)


def check_workers(context: RunContext, address: str) -> None:
    """See that every worker of a running cluster shares our disks and reaches our store and Prefect's API.

    Raises:
        PuzzleError: nothing answers there, there are no workers, or what each of them lacks.
    """
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise PuzzleError(
            f"no Dask scheduler answers at {address} ({error}): start one with `dask scheduler`, or correct "
            "runtime.dask_address"
        ) from error
    scratch = context.scratch / f".seen-by-{uuid.uuid4().hex}"
    with client, context.store().staging() as staged:
        shared = {"runtime.scratch": scratch.resolve(), "runtime.store": (staged / "seen").resolve()}
        for file in shared.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        try:
            told = client.run(partial(_lacks, context, shared, PREFECT_API_URL.value()), on_error="return")
        finally:
            scratch.unlink()
    if not told:
        raise PuzzleError(f"the Dask cluster at {address} has no workers: start some with `dask worker {address}`")
    lacking = {worker: lack for worker, lack in told.items() if lack}
    if lacking:
        lines = "\n".join(f"{worker}: {lack}" for worker, lack in lacking.items())
        raise PuzzleError(
            f"{len(lacking)} of {len(told)} Dask workers at {address} cannot do this run's tasks:\n{lines}\n"
            "every worker needs this project installed, the same scratch directory and store under the same absolute "
            "paths (or a store in a bucket), the parent, and Prefect's API (docs/scale.md)"
        )


def _lacks(context: RunContext, shared: dict[str, Path], api_url: str) -> str | None:
    """What a worker lacks; run there."""
    for name, file in shared.items():
        if not file.exists():
            return f"{name} is not the directory {file.parent} of the machine that started the run"
    if "://" in context.runtime.store:
        context.store().keys("tokens")
    elif Path(context.runtime.store).resolve() not in shared["runtime.store"].parents:
        return f"runtime.store is {Path(context.runtime.store).resolve()} there: give an absolute path"
    if Path(context.runtime.scratch).resolve() != shared["runtime.scratch"].parent:
        return f"runtime.scratch is {Path(context.runtime.scratch).resolve()} there: give an absolute path"
    context.open_parent()
    with urllib.request.urlopen(f"{api_url}/health", timeout=10):
        return None
