"""Flow runs that have not ended: to be cancelled before their worker stops, or known to be dead.

Prefect leaves a run as Running for ever when its process is killed and no worker is there to say so, and a run of its
deployment that waits for its turn then waits for ever too. `make down` cancels what runs; `make up` finds what a power
cut has left of deployments. What a command runs carries the command's process, so that the next command on that machine
finds what was killed.
"""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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
"""How long after a run its server may still be writing down how the tasks of it ended."""
LATE_SECONDS = 2.0
"""How long after a process was killed its server may still be writing down which tasks had begun."""
PROCESS = "puzzle.process"
"""The label of an outermost run that tells its process."""


def label_process(_flow: object, run: FlowRun, _state: object) -> None:
    """Have a run that starts carry its process; a hook of every flow that people start."""
    if run.parent_task_run_id is None and (process := this_process()):
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(run.id, {PROCESS: process})


def cancel_runs(api: str, seconds: float) -> list[UUID]:
    """Ask the worker to cancel what it runs, and wait until it has, as long as that.

    Returns:
        The runs that the worker has not cancelled in that time.
    """
    with _client(api) as client:
        for run in _of_deployments(client):
            client.set_flow_run_state(run.id, Cancelling(message="The services are stopped."))
        deadline = time.monotonic() + seconds
        while (left := _of_deployments(client)) and time.monotonic() < deadline:
            time.sleep(0.3)
    return [run.id for run in left]


def mark_cancelled(api: str, runs: list[UUID]) -> None:
    """Mark runs as cancelled whose processes were stopped, unless they came to their own end before."""
    cancelled: State[Any] = Cancelled(message="The services are stopped.")
    with _client(api) as client:
        for run in runs:
            if client.read_flow_run(run).state_type not in (StateType.COMPLETED, StateType.FAILED):
                client.set_flow_run_state(run, cancelled, force=True)


def crash_orphans(api: str, no_worker: bool = False) -> int:
    """Mark open runs that no process is at, and what was within them, as crashed.

    Args:
        api: the URL of the Prefect API.
        no_worker: whether it is known that no worker runs, so that open runs of deployments are dead too.

    Returns:
        How many there were.
    """
    dead: State[Any] = Crashed(message="Its process had ended without saying so.")
    with _client(api) as client:
        found = [run for run in _open(client) if _is_dead(_outermost(client, run), run, no_worker)]
        for run in found:
            client.set_flow_run_state(run.id, dead, force=True)
        if found:
            time.sleep(LATE_SECONDS)
        for task_run in _left_tasks(client, [run.id for run in found]):
            client.set_task_run_state(task_run, dead, force=True)
    if found:
        log.info("%d runs had ended without saying so: they are marked as crashed, run them again", len(found))
    return len(found)


@contextmanager
def _client(api: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


def _of_deployments(client: SyncPrefectClient) -> list[FlowRun]:
    return [run for run in _open(client) if run.deployment_id]


def _open(client: SyncPrefectClient) -> list[FlowRun]:
    """All of them, however many pages the server makes of the answer."""
    found: list[FlowRun] = []
    chosen = FlowRunFilter.model_validate({"state": OPEN})
    while page := client.read_flow_runs(flow_run_filter=chosen, offset=len(found)):
        found += page
    return found


def _left_tasks(client: SyncPrefectClient, buried: list[UUID]) -> set[UUID]:
    """Open task runs of these flow runs, and of runs that ended long enough ago for the server to have noted the end.

    Of tasks that end before they began, for a clock was set back meanwhile, the server notes no end.
    """
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=NOTING_SECONDS)
    within: list[Any] = [{"state": {"type": {"any_": ENDED}}, "end_time": {"before_": long_ago}}]
    if buried:
        within.append({"id": {"any_": buried}})
    chosen, found = TaskRunFilter.model_validate({"state": OPEN_TASKS}), set[UUID]()
    for runs in map(FlowRunFilter.model_validate, within):
        seen = 0
        while page := client.read_task_runs(flow_run_filter=runs, task_run_filter=chosen, offset=seen):
            seen += len(page)
            found |= {task_run.id for task_run in page}
    return found


def _outermost(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """The run that a run is part of, however deep within, or the run itself."""
    while run.parent_task_run_id:
        within = client.read_task_run(run.parent_task_run_id).flow_run_id
        if within is None:
            break
        run = client.read_flow_run(within)
    return run


def _is_dead(outermost: FlowRun, run: FlowRun, no_worker: bool) -> bool:
    """Whether no process can be at a run: it ends with the one that it is part of, and only workers run deployments.

    A worker that runs says itself what has become of its processes.
    """
    ended = outermost is not run and outermost.state is not None and outermost.state.is_final()
    if outermost.deployment_id:
        return ended or no_worker
    return ended or is_gone(str(outermost.labels.get(PROCESS, "")))
