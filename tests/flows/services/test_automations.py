"""Automations and schedules on a real server: registered once, and left as people left them."""

import uuid
from pathlib import Path

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule

from flows.services.automations import AUTOMATIONS, register_automations
from flows.services.schedules import kept_schedules, resume_schedule_once
from puzzle_core.errors import SpecError

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / AUTOMATIONS).glob("*.yaml"))


@flow(name="automated")
def automated():
    """Never called."""


@pytest.fixture
def client(prefect_server):
    with get_client(sync_client=True) as client:
        yield client


def deploy(client, name, active):
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 0 1 1 *"), slug="yearly", active=active)
    return client.create_deployment(client.create_flow(automated), name, schedules=[schedule])


def is_active(client, deployment):
    (schedule,) = client.read_deployment_schedules(deployment)
    return schedule.active


@pytest.fixture
def shipped(client, tmp_path):
    """The shipped automations by file, with a name, a deployment and a block of this test's own."""
    names = {"name": uuid.uuid4().hex, "deployment": uuid.uuid4().hex, "block": f"block-{uuid.uuid4().hex}"}
    for file in SHIPPED:
        text = file.read_text().replace("research-targets/research-targets", f"automated/{names['deployment']}")
        content = yaml.safe_load(text.replace("puzzle-notify", names["block"]))
        content["name"] = f"{content['name']}-{names['name']}"
        (tmp_path / file.name).write_text(yaml.safe_dump(content))
    return tmp_path, names


def test_automations_are_registered_once_with_the_ids_of_what_they_name(client, shipped, prefect_server, caplog):
    directory, names = shipped
    suffix = names["name"]
    with caplog.at_level("INFO"):
        assert register_automations(prefect_server, directory) == [f"puzzle-dead-runs-{suffix}"]
    assert f"the server has no deployment automated/{names['deployment']}" in caplog.text
    assert f"create a notification block named {names['block']} in the UI" in caplog.text

    first = deploy(client, names["deployment"], active=False)
    found = register_automations(prefect_server, directory)
    assert f"puzzle-new-work-{suffix}" in found
    (automation,) = client.read_automations_by_name(f"puzzle-new-work-{suffix}")
    assert automation.actions[0].deployment_id == first
    client.pause_automation(automation.id)

    client.delete_deployment(first)
    again = deploy(client, names["deployment"], active=False)
    assert register_automations(prefect_server, directory) == found
    (automation,) = client.read_automations_by_name(f"puzzle-new-work-{suffix}")
    assert (automation.actions[0].deployment_id, automation.enabled) == (again, False)
    client.delete_deployment(again)


def test_notifications_are_registered_once_there_is_a_block_for_them(client, shipped, prefect_server):
    from prefect.blocks.notifications import SlackWebhook

    directory, names = shipped
    block = SlackWebhook(url="https://hooks.example/never-called").save(names["block"])
    assert f"puzzle-failed-runs-{names['name']}" in register_automations(prefect_server, directory)
    (automation,) = client.read_automations_by_name(f"puzzle-failed-runs-{names['name']}")
    assert automation.actions[0].block_document_id == block


def test_a_file_that_is_no_automation_is_refused(prefect_server, tmp_path):
    (tmp_path / "wrong.yaml").write_text("name: wrong\ntrigger: sometimes\nactions: []\n")
    with pytest.raises(SpecError, match=r"wrong.yaml does not hold an automation"):
        register_automations(prefect_server, tmp_path)


def test_the_schedule_is_resumed_by_the_first_run_and_by_no_later_one(client, monkeypatch):
    deployment = deploy(client, uuid.uuid4().hex, active=False)
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID", raising=False)
    resume_schedule_once()
    assert not is_active(client, deployment)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(deployment))
    resume_schedule_once()
    assert is_active(client, deployment)
    (schedule,) = client.read_deployment_schedules(deployment)
    client.update_deployment_schedule(deployment, schedule.id, active=False)  # by a person
    resume_schedule_once()
    assert not is_active(client, deployment)
    client.delete_deployment(deployment)


@pytest.mark.parametrize("left", [True, False])
def test_deploying_again_leaves_schedules_as_they_were(client, prefect_server, left):
    name = uuid.uuid4().hex
    deployment = deploy(client, name, active=left)
    with kept_schedules(prefect_server):
        assert deploy(client, name, active=not left) == deployment
        assert is_active(client, deployment) != left
    assert is_active(client, deployment) == left
    client.delete_deployment(deployment)
