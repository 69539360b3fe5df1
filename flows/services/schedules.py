"""Schedules of deployments: resumed once by their own runs, and kept as people left them when deployed again."""

import contextlib
import logging
from collections.abc import Iterator
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import VariableCreate
from prefect.runtime import deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

log = logging.getLogger("puzzle")
RESUMED = "puzzle_schedule_resumed_"
"""Start of the names of Prefect variables, one per deployment whose schedules a run has resumed."""


def resume_schedule_once() -> None:
    """Resume the schedules of the present run's deployment, the first time that one of its runs asks.

    Whoever pauses them later has the last word. Does nothing in a run of no deployment.
    """
    if deployment.id is None:
        return
    present = UUID(deployment.id)
    with get_client(sync_client=True) as client:
        name = RESUMED + present.hex
        if client.read_variable_by_name(name):
            return
        for schedule in client.read_deployment_schedules(present):
            client.update_deployment_schedule(present, schedule.id, active=True)
            log.info("the schedule %s is active from now on", schedule.slug or schedule.schedule)
        client.create_variable(VariableCreate(name=name, value=True))


@contextlib.contextmanager
def kept_schedules(api: str) -> Iterator[None]:
    """Deployments are registered within: afterwards schedules with a slug are active or paused as they were before."""
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        before = _active(client)
        yield
        for (name, slug), active in before.items():
            found = client.read_deployment_by_name(name)
            for schedule in found.schedules:
                if schedule.slug == slug and schedule.active != active:
                    client.update_deployment_schedule(found.id, schedule.id, active=active)


def _active(client: SyncPrefectClient) -> dict[tuple[str, str], bool]:
    """Whether each schedule with a slug is active, by the deployment's whole name and the slug."""
    flows = {flow.id: flow.name for flow in client.read_flows()}
    return {
        (f"{flows[found.flow_id]}/{found.name}", schedule.slug): bool(schedule.active)
        for found in client.read_deployments()
        for schedule in found.schedules
        if schedule.slug
    }
