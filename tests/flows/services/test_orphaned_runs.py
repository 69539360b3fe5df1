"""Runs that no process is at any more are found, however deep they lie; those of a command that lives are left."""

import time

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import Completed, Crashed, Running

from flows.services import orphaned_runs
from flows.services.orphaned_runs import PROCESS, crash_orphans, label_process, mark_cancelled
from tasks.runtime.process import this_process


@task(task_run_name="work")
def work():
    return 1


@flow(name="innermost", flow_run_name="innermost")
def innermost():
    return work()


@flow(name="middle", flow_run_name="middle")
def middle():
    return innermost()


@flow(name="outermost", flow_run_name="outermost", on_running=[label_process])
def outermost():
    return middle()


@pytest.fixture
def runs(prefect_server):
    """The client, and three runs within each other by name; all have ended."""
    crash_orphans(prefect_server)  # of the tests before
    outermost()
    with get_client(sync_client=True) as client:
        named = FlowRunFilter.model_validate({"name": {"any_": ["outermost", "middle", "innermost"]}})
        found = client.read_flow_runs(flow_run_filter=named)
        yield client, {run.name: run.id for run in sorted(found, key=lambda run: run.created)}


def process_with(field, value):
    """What a process says of itself that is this one but for a field."""
    fields = this_process().split()
    fields[field] = value
    return " ".join(fields)


def states(client, ids):
    return {name: client.read_flow_run(run).state_type.value for name, run in ids.items()}


@pytest.mark.parametrize("left_running", [["innermost"], ["middle", "innermost"], ["outermost", "innermost"]])
def test_what_a_run_left_running_within_it_is_found_dead_once_its_process_is_gone(runs, prefect_server, left_running):
    client, ids = runs
    for name in left_running:
        client.set_flow_run_state(ids[name], Running(), force=True)
    try:
        assert crash_orphans(prefect_server) == 0
        client.update_flow_run_labels(ids["outermost"], {PROCESS: process_with(5, "1")})
        assert crash_orphans(prefect_server) == len(left_running)
        assert states(client, ids) == dict.fromkeys(ids, "COMPLETED") | dict.fromkeys(left_running, "CRASHED")
    finally:
        for name in left_running:
            client.set_flow_run_state(ids[name], Completed(), force=True)


@flow(name="foreign-child", flow_run_name="foreign-child")
def foreign_child():
    return work()


@flow(name="foreign-parent", flow_run_name="foreign-parent")
def foreign_parent():
    return foreign_child()


@pytest.mark.fault("a foreign live run on a shared server", "a child of another flow, whose parent has ended")
def test_a_run_of_a_foreign_flow_is_left_whatever_became_of_its_parent(prefect_server, monkeypatch, outcome):
    monkeypatch.setattr(orphaned_runs, "NOTING_SECONDS", -60.0)  # a flow run that ends now counts as ended long ago
    foreign_parent()
    with get_client(sync_client=True) as client:
        named = FlowRunFilter.model_validate({"name": {"any_": ["foreign-child"]}})
        (child,) = client.read_flow_runs(flow_run_filter=named)
        (task_run,) = recorded(client, child.id)
        for parent_state in ("COMPLETED", "CRASHED"):
            parent = client.read_task_run(child.parent_task_run_id).flow_run_id
            client.set_flow_run_state(parent, Crashed() if parent_state == "CRASHED" else Completed(), force=True)
            client.set_task_run_state(task_run.id, Running(), force=True)
            for child_state in (Running(), Completed()):  # a task may also outlive its flow run
                client.set_flow_run_state(child.id, child_state, force=True)
                for deployments in (False, True):
                    assert crash_orphans(prefect_server, deployments) == 0
                    assert client.read_flow_run(child.id).state_type == child_state.type
                    assert client.read_task_run(task_run.id).state_type.value == "RUNNING"
        client.set_task_run_state(task_run.id, Completed(), force=True)
    outcome(run="goes on", shown="left as it was, its tasks too: it does not carry the label of this project")


def test_a_run_of_a_deployment_is_left_to_its_worker_unless_no_worker_runs(runs, prefect_server):
    client, ids = runs
    deployed = client.create_deployment(flow_id=client.read_flow_run(ids["outermost"]).flow_id, name="deployed")
    run = client.create_flow_run_from_deployment(deployed)
    try:
        client.set_flow_run_state(run.id, Running(), force=True)
        assert crash_orphans(prefect_server, deployments=True) == 0  # it has no label
        client.update_flow_run_labels(run.id, {PROCESS: process_with(2, "another-boot")})
        assert crash_orphans(prefect_server) == 0
        assert crash_orphans(prefect_server, deployments=True) == 1
    finally:
        client.delete_deployment(deployed)
        client.set_flow_run_state(run.id, Completed(), force=True)


def test_runs_and_tasks_of_a_process_that_is_gone_are_found_dead_and_those_of_others_are_left(runs, prefect_server):
    client, ids = runs
    labels = {name: client.read_flow_run(run).labels.get(PROCESS) for name, run in ids.items()}
    assert labels == {"outermost": this_process(), "middle": None, "innermost": None}
    (task_run,) = recorded(client, ids["innermost"])
    for process, dead in (
        (this_process(), False),
        (process_with(0, "another-host"), False),
        (process_with(5, "1"), True),
        (process_with(2, "another-boot"), True),
    ):
        client.update_flow_run_labels(ids["outermost"], {PROCESS: process})
        for run in ids.values():
            client.set_flow_run_state(run, Running(), force=True)
        client.set_task_run_state(task_run.id, Running(), force=True)
        try:
            assert crash_orphans(prefect_server) == (3 if dead else 0)
            expected = "CRASHED" if dead else "RUNNING"
            assert states(client, ids) == dict.fromkeys(ids, expected)
            assert client.read_task_run(task_run.id).state_type.value == expected
        finally:
            for run in ids.values():
                client.set_flow_run_state(run, Completed(), force=True)


def test_what_was_stopped_before_its_worker_said_so_is_cancelled_and_what_had_ended_stays(runs, prefect_server):
    client, ids = runs
    client.set_flow_run_state(ids["innermost"], Running(), force=True)
    client.set_flow_run_state(ids["middle"], Crashed(), force=True)  # as a process says that is stopped
    mark_cancelled(prefect_server, list(ids.values()))
    assert states(client, ids) == {"outermost": "COMPLETED", "middle": "CANCELLED", "innermost": "CANCELLED"}


def recorded(client, run, longest_seconds=120):
    """The task runs of a flow run, which the server writes down a moment after they end."""
    deadline, only = time.monotonic() + longest_seconds, FlowRunFilter.model_validate({"id": {"any_": [run]}})
    while time.monotonic() < deadline:
        found = client.read_task_runs(flow_run_filter=only)
        if found and all(task_run.state_type.value == "COMPLETED" for task_run in found):
            return found
        time.sleep(0.2)
    raise AssertionError("the task run was not recorded")
