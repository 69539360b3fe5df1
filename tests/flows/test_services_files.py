"""The files with which a team runs the services: compose and systemd, as far as they can be seen without either."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

from flows.services.prefect_server import SETTINGS

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "deployments/compose.yaml").read_text())
UNITS = sorted((ROOT / "deployments/systemd").glob("*.service"))
ENVIRONMENT = dict(
    line.split("=", 1)
    for line in (ROOT / "deployments/systemd/puzzle.env.example").read_text().splitlines()
    if line and not line.startswith("#")
)


@pytest.mark.parametrize("environment", [COMPOSE["services"]["prefect"]["environment"], ENVIRONMENT])
def test_the_servers_have_the_settings_under_which_no_rows_are_lost(environment):
    assert {name: environment.get(name) for name in SETTINGS} == SETTINGS
    assert environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")


def test_services_of_compose_wait_for_those_that_are_there_and_only_this_machine_reaches_them():
    services = COMPOSE["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= services.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        mounted = {volume.partition(":")[0] for volume in service.get("volumes", ())}
        assert {volume for volume in mounted if not volume.startswith("$")} <= COMPOSE["volumes"].keys()
    assert services["deploy"]["environment"] == services["worker"]["environment"]


def test_units_take_every_variable_from_the_file_that_is_shipped_and_no_secret_stands_in_them():
    assert len(UNITS) == 3
    for file in UNITS:
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read(file)
        service = unit["Service"]
        assert service["EnvironmentFile"] == "/etc/puzzle/puzzle.env"
        assert set(re.findall(r"\$\{(\w+)\}", service["ExecStart"])) <= ENVIRONMENT.keys()
        assert service["ExecStart"].startswith(f"{service['WorkingDirectory']}/.venv/bin/")
        assert "://" not in file.read_text()
    secrets = [value for name, value in ENVIRONMENT.items() if re.search("SECRET|KEY|DATABASE", name)]
    assert [value for value in secrets if "CHANGE" not in value] == []
