"""Runs that no process is at any more are found, however deep they lie; those of a command that lives are left."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import Completed, Running

from flows.open_runs import bury_runs


@flow(name="innermost", flow_run_name="innermost")
def innermost():
    return 1


@flow(name="middle", flow_run_name="middle")
def middle():
    return innermost()


@flow(name="outermost", flow_run_name="outermost")
def outermost():
    return middle()


@pytest.fixture
def runs(prefect_server):
    """The client, and three runs within each other by name; all have ended."""
    outermost()
    with get_client(sync_client=True) as client:
        named = FlowRunFilter.model_validate({"name": {"any_": ["outermost", "middle", "innermost"]}})
        found = client.read_flow_runs(flow_run_filter=named)
        yield client, {run.name: run.id for run in sorted(found, key=lambda run: run.created)}


def states(client, ids):
    return {name: client.read_flow_run(run).state_type.value for name, run in ids.items()}


@pytest.mark.parametrize(
    ("left_running", "buried"),
    [
        (["innermost"], ["innermost"]),
        (["middle", "innermost"], ["middle", "innermost"]),
        (["outermost", "middle", "innermost"], []),
        (["outermost", "innermost"], []),
        ([], []),
    ],
)
def test_what_a_run_left_running_within_it_is_found_dead_once_it_has_ended(runs, prefect_server, left_running, buried):
    client, ids = runs
    for name in left_running:
        client.set_flow_run_state(ids[name], Running(), force=True)
    try:
        assert bury_runs(prefect_server) == len(buried)
        expected = dict.fromkeys(left_running, "RUNNING") | dict.fromkeys(buried, "CRASHED")
        assert states(client, ids) == dict.fromkeys(ids, "COMPLETED") | expected
    finally:
        for name in left_running:
            client.set_flow_run_state(ids[name], Completed(), force=True)
