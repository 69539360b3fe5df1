"""Flow runs of deployments that have not ended: to be cancelled before their worker stops, or known to be dead.

Prefect leaves a run as Running for ever when its worker and its process end together, and a run of its deployment that
waits for its turn then waits for ever too. `make down` cancels what runs; `make up` finds what a power cut has left.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed

OPEN = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}


def cancel_runs(api: str, seconds: float) -> None:
    """Ask the worker to cancel what it runs, and wait until it has, as long as that."""
    with _client(api) as client:
        for run in _of_deployments(client):
            client.set_flow_run_state(run.id, Cancelling(message="The services are stopped."))
        deadline = time.monotonic() + seconds
        while _of_deployments(client) and time.monotonic() < deadline:
            time.sleep(0.3)


def bury_runs(api: str) -> int:
    """Mark open runs of deployments, and what was within them, as crashed, where it is known that no worker runs.

    Returns:
        How many there were.
    """
    dead: State[Any] = Crashed(message="Its worker and its process were gone when the services started.")
    with _client(api) as client:
        found = [run for run in _open(client) if _is_dead(_outermost(client, run), run)]
        for run in found:
            client.set_flow_run_state(run.id, dead, force=True)
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


def _outermost(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """The run that a run is part of, however deep within, or the run itself."""
    while run.parent_task_run_id:
        within = client.read_task_run(run.parent_task_run_id).flow_run_id
        if within is None:
            break
        run = client.read_flow_run(within)
    return run


def _is_dead(outermost: FlowRun, run: FlowRun) -> bool:
    """Whether no process can be at a run: only workers run deployments, and a run ends with the one that it is part of.

    A run that a person's command started may go on while services are started again.
    """
    ended = outermost is not run and outermost.state is not None and outermost.state.is_final()
    return outermost.deployment_id is not None or ended
