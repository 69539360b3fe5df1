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
    """Mark open runs, and those within them, as crashed, where it is known that no worker runs.

    Returns:
        How many there were.
    """
    dead: State[Any] = Crashed(message="Its worker and its process were gone when the services started.")
    buried = 0
    with _client(api) as client:
        runs = _of_deployments(client)
        while runs:
            for run in runs:
                client.set_flow_run_state(run.id, dead, force=True)
            buried += len(runs)
            within = {"parent_flow_run_id": {"any_": [str(run.id) for run in runs]}, "state": OPEN}
            runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(within))
    return buried


@contextmanager
def _client(api: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


def _of_deployments(client: SyncPrefectClient) -> list[FlowRun]:
    open_ones = FlowRunFilter.model_validate({"deployment_id": {"is_null_": False}, "state": OPEN})
    return client.read_flow_runs(flow_run_filter=open_ones)
