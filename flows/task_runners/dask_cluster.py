"""Tasks on the workers of a Dask cluster: a local one that lives as long as a flow, or one at an address.

Tasks share the run's scratch directory and its store. So a cluster of several machines needs a shared disk for the
scratch directory, and a bucket or a shared disk for the store (docs/scale.md). Workers that lack something are named
before any task runs. Dask sends pickled Python objects between processes: open its ports to trusted networks only.
"""

import logging
import urllib.request
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import distributed
from prefect.settings import PREFECT_API_URL
from prefect.utilities.annotations import quote
from prefect_dask.task_runners import DaskTaskRunner

from flows.task_runners.threads import stop_thread
from puzzle_core.errors import PuzzleError
from tasks.runtime.context import RunContext
from tasks.runtime.software import difference, software
from tasks.store.origin import Software

CONNECT_SECONDS = 20
# `Any` below stands for objects of distributed, which has no types, and for arguments that only pass through.
logging.getLogger("distributed").setLevel(logging.WARNING)  # it logs every connection


class ClusterTaskRunner(DaskTaskRunner):  # type: ignore[misc]
    """One single-threaded process per task slot, or a running cluster's workers; stopped when a run is cancelled."""

    @classmethod
    def of(cls, context: RunContext) -> "ClusterTaskRunner":
        """The cluster that the run's specification names; the first task connects to it or starts it."""
        if context.runtime.dask_address:
            return cls(address=context.runtime.dask_address)
        local_cluster = {
            "n_workers": context.workers,
            "threads_per_worker": 1,
            "memory_limit": 0,
            "dashboard_address": "127.0.0.1:0",
        }
        return cls(cluster_class=distributed.LocalCluster, cluster_kwargs=local_cluster)

    def __enter__(self) -> "ClusterTaskRunner":
        self._submitted: list[Any] = []
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def submit(self, task: Any, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Submit a task, and keep its future for `__exit__`; prefect-dask would make tuples of quoted parameters."""
        plain = {name: value.unquote() if isinstance(value, quote) else value for name, value in parameters.items()}
        future = super().submit(task, plain, *args, **kwargs)
        self._submitted.append(future.wrapped_future)
        return future

    def __exit__(self, *args: Any) -> None:
        """Drop waiting tasks and stop running ones: there are some if the flow failed or was cancelled."""
        unfinished = [future for future in self._submitted if not future.done()]
        if unfinished:
            self.client.cancel(unfinished)
            self.client.run(_stop, {future.key for future in unfinished}, on_error="ignore")
        super().__exit__(*args)


def _stop(keys: set[str], dask_worker: Any) -> None:
    """Stop the threads of a worker that run these tasks."""
    with dask_worker.active_threads_lock:
        for thread, key in dask_worker.active_threads.items():
            if key in keys:
                stop_thread(thread)


def check_workers(context: RunContext, address: str, parent: str) -> None:
    """Check that every worker of a cluster can do this run's tasks.

    A worker has the code and the packages of this process, shares this machine's disks, holds the same parent, and
    reaches the store and Prefect's API.

    Args:
        context: the run's context.
        address: the cluster's scheduler.
        parent: digest of the parent.

    Raises:
        PuzzleError: the scheduler does not respond, the cluster has no workers, or workers lack something; names each.
    """
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise PuzzleError(
            f"no Dask scheduler responds at {address} ({error}): start one with `dask scheduler`, or correct "
            "runtime.dask_address"
        ) from error
    probe = context.scratch / f".seen-by-{uuid.uuid4().hex}"
    with client, context.store().staging() as staged:
        probes = {"runtime.scratch": probe.resolve(), "runtime.store": (staged / "seen").resolve()}
        for file in probes.values():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        try:
            lacks = partial(_lacks, context, probes, PREFECT_API_URL.value(), parent, software())
            replies = client.run(lacks, on_error="return")
        finally:
            probe.unlink()
    if not replies:
        raise PuzzleError(f"the Dask cluster at {address} has no workers: start some with `dask worker {address}`")
    lacking = {worker: lack for worker, lack in replies.items() if lack}
    if lacking:
        lines = "\n".join(f"{worker}: {lack}" for worker, lack in lacking.items())
        raise PuzzleError(
            f"{len(lacking)} of {len(replies)} Dask workers at {address} cannot do this run's tasks:\n{lines}\n"
            "every worker needs the same version of this project and of its packages, the same scratch directory and "
            "store under equal absolute paths (or a store in a bucket), the parent, and Prefect's API (docs/scale.md)"
        )


def _lacks(context: RunContext, probes: dict[str, Path], api_url: str, parent: str, expected: Software) -> str | None:
    """What a worker lacks, or nothing; runs on the worker.

    Args:
        context: the run's context.
        probes: by setting, a file that the starting machine has created in that directory.
        api_url: the URL of Prefect's API.
        parent: digest of the parent.
        expected: the software of the process that started the run.
    """
    if other := difference(expected, software()):
        return other
    for name, file in probes.items():
        if not file.exists():
            return f"{name} is not the directory {file.parent} of the machine that started the run"
    if "://" in context.runtime.store:
        context.store().keys("tokens")
    elif Path(context.runtime.store).resolve() not in probes["runtime.store"].parents:
        return f"runtime.store is {Path(context.runtime.store).resolve()} on this worker: give an absolute path"
    if Path(context.runtime.scratch).resolve() != probes["runtime.scratch"].parent:
        return f"runtime.scratch is {Path(context.runtime.scratch).resolve()} on this worker: give an absolute path"
    context.parent_of(parent)
    with urllib.request.urlopen(f"{api_url}/health", timeout=10):
        return None
