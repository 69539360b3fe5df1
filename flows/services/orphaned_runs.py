"""Flow runs that have not ended: cancelled before their worker stops, or marked as crashed when their process is gone.

When a run's process is killed and no worker runs, Prefect shows the run as Running for ever, and later runs of its
deployment wait for it. `make down` cancels running runs. `make up` marks the runs of deployments that a power cut has
ended. A run of a command is labelled with the command's process, so that the next command on that machine can tell
whether this process is gone.
"""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed

from tasks.runtime.process import is_gone, this_process

log = logging.getLogger("puzzle")
OPEN = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
ENDED = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]
OPEN_TASKS = {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED"]}}
NOTING_SECONDS = 60.0
"""How long after the end of a run its server may still store the final states of its tasks."""
LATE_SECONDS = 2.0
"""How long after a process was killed its server may still store which of its tasks had begun."""
PROCESS = "puzzle.process"
"""The label of an outermost run that names its process."""


def label_process(flow: object, flow_run: FlowRun, state: object) -> None:
    """Label a starting run with its process; a hook of every flow that users start."""
    if flow_run.parent_task_run_id is None and (process := this_process()):
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, {PROCESS: process})


def cancel_runs(api: str, seconds: float) -> list[UUID]:
    """Ask the worker to cancel its runs, and wait for this at most as many seconds.

    Returns:
        The runs that the worker has not cancelled in that time.
    """
    with _client(api) as client:
        for run in _of_deployments(client):
            client.set_flow_run_state(run.id, Cancelling(message="The services are stopped."))
        deadline = time.monotonic() + seconds
        while (uncancelled := _of_deployments(client)) and time.monotonic() < deadline:
            time.sleep(0.3)
    return [run.id for run in uncancelled]


def mark_cancelled(api: str, runs: list[UUID]) -> None:
    """Mark runs whose processes were stopped as cancelled, except those that completed or failed before."""
    cancelled: State[None] = Cancelled(message="The services are stopped.")
    with _client(api) as client:
        for run in runs:
            if client.read_flow_run(run).state_type not in (StateType.COMPLETED, StateType.FAILED):
                client.set_flow_run_state(run, cancelled, force=True)


def crash_orphans(api: str, no_worker: bool = False) -> int:
    """Mark open runs without a process, and their sub-flow and task runs, as crashed.

    Args:
        api: the URL of the Prefect API.
        no_worker: no worker runs, so open runs of deployments have no process either.

    Returns:
        The number of flow runs marked.
    """
    dead: State[None] = Crashed(message="The process of this run ended without reporting a final state.")
    with _client(api) as client:
        orphans = [run for run in _open(client) if _is_dead(_outermost(client, run), run, no_worker)]
        for run in orphans:
            client.set_flow_run_state(run.id, dead, force=True)
        if orphans:
            time.sleep(LATE_SECONDS)
        for task_run in _orphaned_tasks(client, [run.id for run in orphans]):
            client.set_task_run_state(task_run, dead, force=True)
    if orphans:
        log.info("%d runs ended without a final state: they are marked as crashed, run them again", len(orphans))
    return len(orphans)


@contextmanager
def _client(api: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


def _of_deployments(client: SyncPrefectClient) -> list[FlowRun]:
    return [run for run in _open(client) if run.deployment_id]


def _open(client: SyncPrefectClient) -> list[FlowRun]:
    """All open flow runs, from every page of the server's answer."""
    runs: list[FlowRun] = []
    chosen = FlowRunFilter.model_validate({"state": OPEN})
    while page := client.read_flow_runs(flow_run_filter=chosen, offset=len(runs)):
        runs += page
    return runs


def _orphaned_tasks(client: SyncPrefectClient, crashed: list[UUID]) -> set[UUID]:
    """Open task runs of these flow runs, and of flow runs that ended more than NOTING_SECONDS ago.

    The server stores no end of a task whose end time is before its start time, which happens if a clock is set back.
    """
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=NOTING_SECONDS)
    flow_runs: list[dict[str, object]] = [{"state": {"type": {"any_": ENDED}}, "end_time": {"before_": long_ago}}]
    if crashed:
        flow_runs.append({"id": {"any_": crashed}})
    chosen, orphans = TaskRunFilter.model_validate({"state": OPEN_TASKS}), set[UUID]()
    for runs in map(FlowRunFilter.model_validate, flow_runs):
        seen = 0
        while page := client.read_task_runs(flow_run_filter=runs, task_run_filter=chosen, offset=seen):
            seen += len(page)
            orphans |= {task_run.id for task_run in page}
    return orphans


def _outermost(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """The outermost flow run that this run is a sub-flow of, or the run itself."""
    while run.parent_task_run_id:
        parent = client.read_task_run(run.parent_task_run_id).flow_run_id
        if parent is None:
            break
        run = client.read_flow_run(parent)
    return run


def _is_dead(outermost: FlowRun, run: FlowRun, no_worker: bool) -> bool:
    """Whether a run has no process: its outermost run has ended, or the process of that run is gone.

    Only workers run deployments; a running worker reports the end of its processes itself.
    """
    ended = outermost is not run and outermost.state is not None and outermost.state.is_final()
    if outermost.deployment_id:
        return ended or no_worker
    return ended or is_gone(str(outermost.labels.get(PROCESS, "")))
