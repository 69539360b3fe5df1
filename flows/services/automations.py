"""The automations that are shipped as files, registered on a Prefect server.

A file names deployments and notification blocks, whose ids only the server knows. An automation that the server has
stays as it is, on or off, but for the ids that it names.
"""

import logging
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from puzzle_core.errors import SpecError

log = logging.getLogger("puzzle")
AUTOMATIONS = Path("deployments/automations")


class MissingError(Exception):
    """The server lacks what an automation names; the text says what to do."""


def register_automations(api: str, directory: Path) -> list[str]:
    """Register the automations of a directory, and bring the ids of those that are registered up to date.

    Args:
        api: the URL of the Prefect API.
        directory: holds one YAML file per automation.

    Returns:
        The names of the automations that the server has now.

    Raises:
        SpecError: a file does not hold an automation.
    """
    names = []
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for file in sorted(directory.glob("*.yaml")):
            try:
                names.append(_register(client, file))
            except MissingError as error:
                log.info("automation %s is not registered: %s", file.stem, error)
    return names


def _register(client: SyncPrefectClient, file: Path) -> str:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    for action in content["actions"]:
        _put_ids(client, action)
    try:
        wanted = AutomationCore.model_validate(content)
    except ValueError as error:
        raise SpecError(f"{file} does not hold an automation: {error}") from error
    present = client.read_automations_by_name(wanted.name)
    if not present:
        client.create_automation(wanted)
        log.info("automation %s is registered", wanted.name)
    for automation in present:
        if automation.actions != wanted.actions:
            fields = set(AutomationCore.model_fields) - {"owner_resource"}  # which an update does not take
            core = AutomationCore.model_validate(automation.model_dump(include=fields))
            client.update_automation(automation.id, core.model_copy(update={"actions": wanted.actions}))
    return wanted.name


def _put_ids(client: SyncPrefectClient, action: dict[str, Any]) -> None:
    """Put ids in place of the names in an action.

    Raises:
        MissingError: the server does not have what is named.
    """
    if name := action.get("deployment_id"):
        try:
            action["deployment_id"] = client.read_deployment_by_name(name).id
        except ObjectNotFound as error:
            raise MissingError(f"the server has no deployment {name}: `prefect deploy --all` registers it") from error
    if name := action.get("block_document_id"):
        action["block_document_id"] = _block(client, name)


def _block(client: SyncPrefectClient, name: str) -> UUID:
    answer = client.request("POST", "/block_documents/filter", json={"block_documents": {"name": {"any_": [name]}}})
    for document in answer.json():
        if "notify" in document["block_schema"]["capabilities"]:
            return UUID(document["id"])
    raise MissingError(
        f"create a notification block named {name} in the UI under Blocks (Slack, e-mail, a webhook), then run "
        "`puzzle automations`"
    )
