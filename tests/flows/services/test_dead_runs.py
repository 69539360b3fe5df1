"""The automation that is shipped: a deployment's run whose heartbeats stop is shown as crashed, and no other run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.events import emit_event
from prefect.events.schemas.automations import AutomationCore
from prefect.settings.models.flows import FlowsSettings
from prefect.states import Completed, Running

ROOT = Path(__file__).parents[3]
AUTOMATION = ROOT / "deployments" / "automations" / "dead-runs.yaml"
SHORTEST_WITHIN = 10  # Prefect takes no less of such a trigger
RUN = """
import sys, time
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from flows.services.orphaned_runs import inherited_tags

@flow(flow_run_name="dead-inner")
def inner():
    Path(sys.argv[2]).touch()
    time.sleep(600)

@flow(flow_run_name="dead-outer")
@inherited_tags()
def outer():
    inner()

with get_client(sync_client=True) as client:
    run = client.read_flow_run(UUID(sys.argv[1]))
run_flow(outer, flow_run=run)
"""


@flow(flow_run_name="of-automation")
def deployed():
    """Never called: its runs are made by hand."""


def test_the_automation_waits_for_more_than_two_of_prefects_own_heartbeats():
    shipped = AutomationCore.model_validate(yaml.safe_load(AUTOMATION.read_text()))
    every = FlowsSettings.model_fields["heartbeat_frequency"].default
    assert shipped.trigger.within.total_seconds() > 2 * every


@pytest.mark.long
@pytest.mark.fault(
    "a worker dies with its machine", "SIGKILL to a run's process, the shipped automation with 10 s for 600"
)
def test_a_run_whose_heartbeats_stop_is_crashed_with_the_runs_within_it(prefect_server, tmp_path, outcome):
    shipped = yaml.safe_load(AUTOMATION.read_text())
    shipped["trigger"]["within"] = SHORTEST_WITHIN
    file, began, script = tmp_path / "dead-runs.yaml", tmp_path / "began", tmp_path / "run.py"
    file.write_text(yaml.safe_dump(shipped))
    script.write_text(RUN)
    environment = os.environ | {"PREFECT_API_URL": prefect_server, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "automation", "create", "--from-file", str(file)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    with get_client(sync_client=True) as client:
        (automation,) = client.read_automations_by_name(shipped["name"])
        tags = {"dead": "puzzle", "live": "puzzle", "ended": "puzzle", "foreign": "other"}
        runs = {name: client.create_flow_run(deployed, tags=[tag], state=Running()).id for name, tag in tags.items()}
        process = subprocess.Popen([sys.executable, str(script), str(runs["dead"]), str(began)], env=environment)
        try:
            for name in ("live", "ended", "foreign"):
                beat(runs[name], tags[name])
            client.set_flow_run_state(runs["ended"], Completed())
            wait_for(lambda: began.exists() or process.poll() is not None)
            within = FlowRunFilter.model_validate({"name": {"any_": ["dead-inner"]}})
            (inner,) = client.read_flow_runs(flow_run_filter=within)
            runs["within the dead"] = inner.id
            time.sleep(1)  # a heartbeat is sent as a run starts, and by a thread of its own
            process.send_signal(signal.SIGKILL)
            process.wait()

            def dead_are_shown():
                beat(runs["live"], "puzzle")
                states = [client.read_flow_run(runs[name]).state for name in ("dead", "within the dead")]
                return all(state.name == "Crashed" for state in states)

            wait_for(dead_are_shown)
            found = {name: client.read_flow_run(run).state for name, run in runs.items()}
        finally:
            process.kill()
            process.wait()
            client.delete_automation(automation.id)
    crashed = dict.fromkeys(("dead", "within the dead"), "CRASHED")
    others = {"live": "RUNNING", "ended": "COMPLETED", "foreign": "RUNNING"}
    assert {name: state.type.value for name, state in found.items()} == crashed | others
    assert {found[name].message for name in crashed} == {shipped["actions"][0]["message"]}
    outcome(
        run="to be started again", shown="Crashed, with the flow run within it; live, ended and foreign ones are left"
    )


def beat(run, tag):
    """Send a heartbeat of a run, as its process would."""
    emit_event(
        "prefect.flow-run.heartbeat",
        {"prefect.resource.id": f"prefect.flow-run.{run}"},
        related=[{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}],
    )


def wait_for(condition, longest_seconds=120):
    deadline = time.monotonic() + longest_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(1)
