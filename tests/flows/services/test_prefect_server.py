"""The server that a command brings along: it schedules, and it is not started where an API is given."""

import datetime
import time
import urllib.request

from prefect import flow

from flows.services.prefect_server import SETTINGS, prefect_api


def test_a_scheduled_run_appears(prefect_server):
    """With a wrong sqlalchemy the server runs, deployments look fine, and nothing is ever scheduled."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.schedules import IntervalSchedule

    @flow
    def researched():
        pass

    every_minute = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=datetime.timedelta(seconds=60)))
    with get_client(sync_client=True) as client:
        name = client.create_deployment(
            flow_id=client.create_flow(researched), name="every minute", schedules=[every_minute], entrypoint="none"
        )
        scheduled = FlowRunFilter.model_validate(
            {"deployment_id": {"any_": [str(name)]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
        )
        deadline, runs = time.monotonic() + 240, []
        while not runs and time.monotonic() < deadline:
            time.sleep(0.5)
            runs = client.read_flow_runs(flow_run_filter=scheduled)
        assert runs
        soonest = min(run.expected_start_time for run in runs)
        assert soonest - datetime.datetime.now(datetime.UTC) < datetime.timedelta(seconds=61)
        client.delete_deployment(name)


def test_no_setting_of_ours_turns_a_service_off():
    switched = {name: value for name, value in SETTINGS.items() if name.endswith("_ENABLED") and value == "false"}
    assert switched == {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


def test_an_api_that_is_given_is_used_and_not_shut_down(prefect_server, tmp_path):
    with prefect_api(tmp_path / "own") as url:
        assert url == prefect_server
    assert not (tmp_path / "own").exists()
    with urllib.request.urlopen(f"{prefect_server}/health", timeout=10) as answer:
        assert answer.status == 200
