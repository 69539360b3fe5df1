"""`make up` and `make down`: Prefect's server and UI, a worker with all deployments, and MLflow's server, on loopback.

Services outlive the command that starts them; their data lie under `.puzzle/`, and the next start finds them there. An
environment variable marks the processes of a directory's services, so that `down` also ends the runs that the worker
started.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from flows.services.automations import AUTOMATIONS, register_automations
from flows.services.orphaned_runs import cancel_runs, crash_orphans, mark_cancelled
from flows.services.postgres import DRIVER, Postgres, check_driver
from flows.services.prefect_server import PREFECT_HOME, RUNNING, SETTINGS, running_api, server_command
from flows.services.schedules import kept_schedules
from flows.services.work_pool import POOL, ensure_work_pool
from puzzle_core.errors import PuzzleError
from tasks.runtime.private_files import private_directory
from tasks.tracking.place import SERVED

log = logging.getLogger("puzzle")
START_SECONDS = 240
STOP_SECONDS = 20
WORKER_COMMAND, RUN_COMMAND = " worker start ", " -m prefect.engine "
"""Parts of the command lines of a worker, and of the processes that it starts for runs."""
MARK = "PUZZLE_SERVICES_OF"
"""Environment variable of every service: the directory that it belongs to."""
TRACKING = Path(".puzzle/mlflow.db")
Database = Literal["sqlite", "postgres"]


class Ports(NamedTuple):
    """The services' ports on 127.0.0.1."""

    prefect: int
    mlflow: int


class Service(NamedTuple):
    """One server process; it is ready once a GET of the URL `health` returns 200."""

    name: str
    command: list[str]
    environment: dict[str, str]
    health: str


def services(directory: Path, ports: Ports, postgres: Postgres | None = None) -> list[Service]:
    """The services in the order in which they start, without the database server.

    Args:
        directory: holds `.puzzle/`, absolute; also the working directory of the worker and its runs.
        ports: the services' ports.
        postgres: holds the servers' databases; none for files of SQLite.
    """
    data = directory / ".puzzle"
    prefect, mlflow = f"http://127.0.0.1:{ports.prefect}", f"http://127.0.0.1:{ports.mlflow}"
    command, environment = server_command(directory / PREFECT_HOME, ports.prefect)
    python = [sys.executable, "-m"]
    tracking = [*python, "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports.mlflow), "--workers", "1"]
    tracking += ["--backend-store-uri", tracking_uri(directory, postgres)]
    tracking += ["--artifacts-destination", str(data / "mlartifacts")]
    tracking += ["--default-artifact-root", (data / "mlartifacts").as_uri()]  # as without the server (mlflow_client.py)
    worker_environment = {
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_HOME": str(directory / PREFECT_HOME),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "puzzle,puzzle_core",
        "PUZZLE_MLFLOW_UI": mlflow,
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI", mlflow),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if postgres:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = postgres.url("prefect", "asyncpg")
    worker = [*python, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "this-machine"]
    return [
        Service("prefect", command, environment, f"{prefect}/api/health"),
        Service("mlflow", tracking, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | SETTINGS, f"{mlflow}/health"),
        Service("worker", worker, worker_environment, f"{prefect}/api/work_pools/{POOL}"),
    ]


def tracking_uri(directory: Path, postgres: Postgres | None) -> str:
    """Where MLflow's server keeps its records."""
    return postgres.url("mlflow", DRIVER) if postgres else f"sqlite:///{directory / TRACKING}"


def up(directory: Path, ports: Ports, database: Database = "sqlite") -> None:
    """Start the services, register the deployments of `prefect.yaml`, and wait until every service is ready.

    Raises:
        PuzzleError: services are running already, a port is taken, or a service did not start; names its log.
    """
    from tasks.tracking.mlflow_client import end_orphaned_runs  # slow to import, and `down` does not need it

    directory = directory.resolve()
    if processes(directory):
        raise PuzzleError(f"services of {directory} are running already: `make down` stops them")
    logs = directory / ".puzzle" / "logs"
    private_directory(logs)
    postgres = None
    if database == "postgres":
        check_driver()
        postgres = Postgres.of(directory)
    started = services(directory, ports, postgres)
    try:
        if postgres:
            _start_postgres(postgres, directory, logs)
        end_orphaned_runs(tracking_uri(directory, postgres))
        servers = [(service, _start(service, directory, logs)) for service in started[:-1]]
        for service, process in servers:
            _wait(service, process, logs)
        worker = started[-1]
        api = worker.environment["PREFECT_API_URL"]
        crash_orphans(api, deployments=True)
        ensure_work_pool(api)
        _wait(worker, _start(worker, directory, logs), logs)
        with kept_schedules(api):
            _run(["prefect", "--no-prompt", "deploy", "--all"], worker.environment, directory, logs / "deploy.log")
        register_automations(api, directory / AUTOMATIONS)
        (directory / PREFECT_HOME / RUNNING).write_text(api)
        (directory / SERVED).write_text(f"http://127.0.0.1:{ports.mlflow}")
    except BaseException:
        down(directory)
        raise


def _start_postgres(postgres: Postgres, directory: Path, logs: Path) -> None:
    """Start the database server, wait until it takes connections, and make the databases."""
    postgres.create()
    service = Service("postgres", postgres.command, {}, "")
    process, deadline = _start(service, directory, logs), time.monotonic() + START_SECONDS
    while not postgres.answers():
        if process.poll() is not None or time.monotonic() > deadline:
            raise PuzzleError(f"PostgreSQL did not start (exit code {process.poll()}): see {_log_of(service, logs)}")
        time.sleep(0.2)
    postgres.create_databases()
    log.info("postgres is up; its log is %s", _log_of(service, logs))


def down(directory: Path) -> int:
    """Cancel the worker's runs, and stop the worker, the processes of its runs and the servers, in this order.

    Returns:
        The number of stopped processes.
    """
    commands = processes(directory)
    api = running_api(directory / PREFECT_HOME)
    uncancelled = cancel_runs(api, STOP_SECONDS) if api and commands else []
    (directory / PREFECT_HOME / RUNNING).unlink(missing_ok=True)
    (directory / SERVED).unlink(missing_ok=True)
    for part in (WORKER_COMMAND, RUN_COMMAND):
        _end(directory, [pid for pid, command in processes(directory).items() if part in f"{command} "])
    if api and uncancelled:
        mark_cancelled(api, uncancelled)
    _end(directory, list(processes(directory)))
    return len(commands)


def processes(directory: Path) -> dict[int, str]:
    """Command lines by process id of everything that `up` started for this directory, and of its descendants."""
    marked: dict[int, str] = {}
    for process in psutil.process_iter(["environ", "cmdline"]):
        environment, command = process.info["environ"], process.info["cmdline"]  # neither for zombies and other users'
        if command and environment and environment.get(MARK) == str(directory.resolve()):
            marked[process.pid] = " ".join(command)
    return marked


def _start(service: Service, directory: Path, logs: Path) -> "subprocess.Popen[bytes]":
    with _log_of(service, logs).open("ab") as stream:
        return subprocess.Popen(
            service.command,
            cwd=directory,
            env=os.environ | service.environment | {MARK: str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            umask=-1 if WORKER_COMMAND in f"{' '.join(service.command)} " else 0o077,
        )


def _wait(service: Service, process: "subprocess.Popen[bytes]", logs: Path) -> None:
    """Wait until a service that was started is ready."""
    output, deadline = _log_of(service, logs), time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _is_healthy(service.health):
            time.sleep(0.2)
            if process.poll() is None:  # otherwise another server uses this port
                log.info("%s is up; its log is %s", service.name, output)
                return
        time.sleep(0.2)
    raise PuzzleError(f"{service.name} did not start (exit code {process.poll()}); is its port taken? See {output}")


def _log_of(service: Service, logs: Path) -> Path:
    return logs / f"{service.name}.log"


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _run(arguments: list[str], environment: dict[str, str], directory: Path, output: Path) -> None:
    with output.open("ab") as stream:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(
            command, cwd=directory, env=os.environ | environment, stdout=stream, stderr=stream, check=False
        )
    if done.returncode:
        raise PuzzleError(f"`{' '.join(arguments)}` failed with exit code {done.returncode}; see {output}")


def _end(directory: Path, pids: list[int]) -> None:
    """End processes with SIGTERM, and with SIGKILL those that still run STOP_SECONDS later."""
    running = []
    for pid in set(pids) & processes(directory).keys():
        with contextlib.suppress(psutil.NoSuchProcess):
            running.append(psutil.Process(pid))
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                stop(process)
        _, running = psutil.wait_procs(running, timeout=STOP_SECONDS)
