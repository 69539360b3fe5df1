"""Flow runs that have not ended: cancelled before their worker stops, or marked as crashed when their process is gone.

When a run's process is killed and no worker runs, Prefect shows the run as Running for ever, and later runs of its
deployment wait for it. `make down` cancels running runs. A run of this project's flows is labelled with its process.
The next command on that machine marks runs whose labelled process has ended, and no others: a server may be shared.
It leaves runs of deployments to their worker, to Prefect's heartbeats, and to `make up` before it starts a worker.
"""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect import tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import flow_run as present_run
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


@contextmanager
def inherited_tags() -> Iterator[None]:
    """Give the tags of the present flow run to the runs within it, which Prefect does not; decorates a flow's function.

    An automation finds runs by their tags (deployments/automations/dead-runs.yaml).
    """
    with tags(*present_run.get_tags()):
        yield


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


def crash_orphans(api: str, deployments: bool = False) -> int:
    """Mark open runs as crashed, with their sub-flow and task runs, whose labelled process has ended on this machine.

    A run without the label, or of a process on another machine or in another container, is left alone.

    Args:
        api: the URL of the Prefect API.
        deployments: runs of deployments too; only while no worker can be starting them again.

    Returns:
        The number of flow runs marked.
    """
    dead: State[None] = Crashed(message="The process of this run ended without reporting a final state.")
    with _client(api) as client:
        processes = _Processes(client, deployments)
        orphans = [run for run in _open(client) if processes.has_ended(run)]
        for run in orphans:
            client.set_flow_run_state(run.id, dead, force=True)
        if orphans:
            time.sleep(LATE_SECONDS)
        for task_run in _orphaned_tasks(client, [run.id for run in orphans], processes):
            client.set_task_run_state(task_run, dead, force=True)
    if orphans:
        log.info("%d runs ended without a final state: they are marked as crashed, run them again", len(orphans))
    return len(orphans)


class _Processes:
    """The processes of flow runs, by their labels."""

    def __init__(self, client: SyncPrefectClient, deployments: bool):
        self._client, self._deployments = client, deployments
        self._ended: dict[UUID, bool] = {}

    def has_ended(self, run: FlowRun) -> bool:
        """Whether the process of this run is known to have ended; false for a run that is not this project's.

        A sub-flow run has the process of the run that it is part of, unless it is a deployment's.
        """
        if run.id not in self._ended:
            self._ended[run.id] = self._find(run)
        return self._ended[run.id]

    def has_ended_of(self, run: UUID) -> bool:
        """As `has_ended`, by the id of a run."""
        return self._ended[run] if run in self._ended else self.has_ended(self._client.read_flow_run(run))

    def _find(self, run: FlowRun) -> bool:
        if run.deployment_id and not self._deployments:
            return False
        if process := run.labels.get(PROCESS):
            return is_gone(str(process))
        if run.deployment_id or run.parent_task_run_id is None:
            return False
        parent = self._client.read_task_run(run.parent_task_run_id).flow_run_id
        return parent is not None and self.has_ended_of(parent)


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


def _orphaned_tasks(client: SyncPrefectClient, crashed: list[UUID], processes: _Processes) -> set[UUID]:
    """Open task runs of these flow runs, and of flow runs of ended processes that ended over NOTING_SECONDS ago.

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
            ours = [run for run in page if run.flow_run_id and processes.has_ended_of(run.flow_run_id)]
            orphans |= {task_run.id for task_run in ours}
    return orphans
