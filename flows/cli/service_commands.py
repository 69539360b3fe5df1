"""`puzzle up`, `puzzle down` and `puzzle ui`: the servers around runs."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import Port

from flows.services.prefect_server import PREFECT_HOME, own_server, prefect_api


def up(
    *,
    prefect_port: Annotated[Port, Parameter(help="Prefect's port on loopback.")] = 4200,
    mlflow_port: Annotated[Port, Parameter(help="MLflow's port on loopback.")] = 5000,
    database: Annotated[
        Literal["sqlite", "postgres"],
        Parameter(help="What Prefect and MLflow keep their data in: files, or a PostgreSQL server started here."),
    ] = "sqlite",
) -> None:
    """Start the services of this directory, and print their addresses."""
    from flows.services.up import Ports
    from flows.services.up import up as start

    start(Path(), Ports(prefect_port, mlflow_port), database)
    sys.stdout.write(f"Prefect  http://127.0.0.1:{prefect_port}\nMLflow   http://127.0.0.1:{mlflow_port}\n")
    sys.stdout.write("`make down` stops them; their logs are in .puzzle/logs\n")


def down() -> None:
    """Stop the services of this directory."""
    from flows.services.up import down as stop

    sys.stdout.write(f"stopped {stop(Path())} processes\n")


def automations() -> None:
    """Register the automations of deployments/automations on the server that PREFECT_API_URL names."""
    with prefect_api(PREFECT_HOME, "flows.services.automations") as api:
        from flows.services.automations import AUTOMATIONS, register_automations

        sys.stdout.write("".join(f"{name}\n" for name in register_automations(api, AUTOMATIONS)))


def ui(*, port: Annotated[Port, Parameter(help="Port on loopback.")] = 4200) -> None:
    """Serve Prefect's UI until interrupted."""
    with own_server(PREFECT_HOME, port) as url:
        from flows.services.orphaned_runs import crash_orphans

        crash_orphans(url)
        sys.stdout.write(f"Prefect UI at {url.removesuffix('/api')}; interrupt to stop\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
