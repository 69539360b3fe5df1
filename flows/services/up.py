"""`make up` and `make down`: Prefect's server and UI, a worker with all deployments, and MLflow's server, on loopback.

Services outlive the command that starts them; what they keep lies under `.puzzle/` and is there again after the next
start. What belongs to them is told by a mark in its environment, so that runs which the worker started end with it.
"""

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from flows.services.orphaned_runs import cancel_runs, crash_orphans, mark_cancelled
from flows.services.prefect_server import PREFECT_HOME, RUNNING, SETTINGS, running_api, server_command
from puzzle_core.errors import PuzzleError

log = logging.getLogger("puzzle")
START_SECONDS = 240
STOP_SECONDS = 20
POOL = "puzzle"
RUN_COMMAND = " -m prefect.engine "
"""In the command line of a process that a worker starts for a run."""
MARK = "PUZZLE_SERVICES_OF"
TRACKING = Path(".puzzle/mlflow.db")


class Ports(NamedTuple):
    """Where the services listen, on 127.0.0.1 only."""

    prefect: int = 4200
    mlflow: int = 5000


class Service(NamedTuple):
    """One process to keep running; `health` is answered with 200 once it is ready."""

    name: str
    command: list[str]
    environment: dict[str, str]
    health: str


def services(place: Path, ports: Ports) -> list[Service]:
    """The services in the order they are started.

    Args:
        place: the directory that holds `.puzzle/`, absolute; also the working directory of the worker and its runs.
        ports: where they listen.
    """
    data = place / ".puzzle"
    prefect, mlflow = f"http://127.0.0.1:{ports.prefect}", f"http://127.0.0.1:{ports.mlflow}"
    command, environment = server_command(place / PREFECT_HOME, ports.prefect)
    python = [sys.executable, "-m"]
    tracking = [*python, "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports.mlflow), "--workers", "1"]
    tracking += ["--backend-store-uri", f"sqlite:///{place / TRACKING}"]
    tracking += ["--artifacts-destination", str(data / "mlartifacts")]
    of_worker = {
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_HOME": str(place / PREFECT_HOME),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "puzzle,puzzle_core",
        "PUZZLE_MLFLOW_UI": mlflow,
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    worker = [*python, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "this-machine"]
    return [
        Service("prefect", command, environment, f"{prefect}/api/health"),
        Service("mlflow", tracking, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | SETTINGS, f"{mlflow}/health"),
        Service("worker", worker, of_worker, f"{prefect}/api/work_pools/{POOL}"),
    ]


def up(place: Path, ports: Ports) -> None:
    """Start what is not running, register the deployments of `prefect.yaml`, and wait until all of it answers.

    Raises:
        PuzzleError: services are running already, a port is taken, or something did not start; names its log.
    """
    from tasks.tracking.mlflow_client import end_orphaned_runs  # slow to import, and `make down` does not need it

    place = place.resolve()
    if processes(place):
        raise PuzzleError(f"services of {place} are running already: `make down` stops them")
    logs = place / ".puzzle" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = services(place, ports)
    end_orphaned_runs(f"sqlite:///{place / TRACKING}")
    try:
        for service in started[:-1]:
            _start(service, place, logs / f"{service.name}.log")
        worker = started[-1]
        crash_orphans(worker.environment["PREFECT_API_URL"], no_worker=True)
        _start(worker, place, logs / "worker.log")
        _run(["prefect", "--no-prompt", "deploy", "--all"], worker.environment, place, logs / "deploy.log")
        (place / PREFECT_HOME / RUNNING).write_text(worker.environment["PREFECT_API_URL"])
    except BaseException:
        down(place)
        raise


def down(place: Path) -> int:
    """Cancel every run, and stop every service: the worker first, so that it can say what it stopped, then what it
    left, and the servers last.

    Returns:
        How many processes were stopped.
    """
    found = processes(place)
    api = running_api(place / PREFECT_HOME)
    left = cancel_runs(api, STOP_SECONDS) if api and found else []
    (place / PREFECT_HOME / RUNNING).unlink(missing_ok=True)
    for part in (" worker start ", RUN_COMMAND):
        _end(place, [pid for pid, command in processes(place).items() if part in f"{command} "])
    if api and left:
        mark_cancelled(api, left)
    _end(place, list(processes(place)))
    return len(found)


def processes(place: Path) -> dict[int, str]:
    """Command lines by process id of all that `up` started here, and of all that these started."""
    mark, found = f"{MARK}={place.resolve()}".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                if command:  # a process that has ended and waits to be collected has none
                    found[int(process.name)] = command.decode(errors="replace")
    return found


def _start(service: Service, place: Path, output: Path) -> None:
    with output.open("ab") as stream:
        process = subprocess.Popen(
            service.command,
            cwd=place,
            env=os.environ | service.environment | {MARK: str(place)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(service.health):
            time.sleep(0.2)
            if process.poll() is None:  # otherwise it was another server that answered on this port
                log.info("%s is up; its log is %s", service.name, output)
                return
        time.sleep(0.2)
    raise PuzzleError(f"{service.name} did not start (exit code {process.poll()}); is its port taken? See {output}")


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _run(arguments: list[str], environment: dict[str, str], place: Path, output: Path) -> None:
    with output.open("ab") as stream:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(
            command, cwd=place, env=os.environ | environment, stdout=stream, stderr=stream, check=False
        )
    if done.returncode:
        raise PuzzleError(f"`{' '.join(arguments)}` failed with exit code {done.returncode}; see {output}")


def _end(place: Path, pids: list[int]) -> None:
    """SIGTERM, and SIGKILL to what has not ended in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in set(pids) & processes(place).keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while set(pids) & processes(place).keys() and time.monotonic() < deadline:
            time.sleep(0.1)


def main(arguments: list[str] | None = None) -> int:
    """`python -m flows.services.up start` and `stop`."""
    parser = argparse.ArgumentParser(prog="flows.services.up", description="start or stop Prefect, a worker and MLflow")
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--prefect-port", type=int, default=Ports().prefect, help="default %(default)s")
    parser.add_argument("--mlflow-port", type=int, default=Ports().mlflow, help="default %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    if not Path("/proc/self").exists():
        parser.error("needs /proc, so Linux; elsewhere start the services one by one (docs/operations.md)")
    ports = Ports(options.prefect_port, options.mlflow_port)
    try:
        if options.action == "stop":
            sys.stdout.write(f"stopped {down(Path())} processes\n")
            return 0
        up(Path(), ports)
    except PuzzleError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"Prefect  http://127.0.0.1:{ports.prefect}\nMLflow   http://127.0.0.1:{ports.mlflow}\n")
    sys.stdout.write("`make down` stops them; their logs are in .puzzle/logs\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
