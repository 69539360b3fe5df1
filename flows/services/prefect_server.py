"""A Prefect API for one command: the one that Prefect's settings name, or that of a server started here, on loopback.

A server that is started here keeps its data in a directory, so that `puzzle ui` can show its runs later. It ends with
the command, even if the command is killed. If a server of `make up` uses the same directory, commands use that server.
SETTINGS are those under which no task rows were lost (benchmarks/task_overhead.py).
"""

import contextlib
import datetime
import fcntl
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from flows.services.server_app import origins
from puzzle_core.errors import PuzzleError
from puzzle_core.parent_death import end_with_parent
from puzzle_core.start_up import lasting_imports
from tasks.runtime.private_files import private_directory

log = logging.getLogger("puzzle")
ROOT = Path(__file__).parents[2]
PREFECT_HOME = Path(".puzzle/prefect")
RUNNING = "api-url"
"""File in a server's directory with the URL of its API, while `make up` keeps it running."""
START_SECONDS = 240  # the first start creates the database, which took 80 s on two busy cores
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}


@contextlib.contextmanager
def prefect_api(home: Path, module: str | None = None) -> Iterator[str]:
    """The URL of a Prefect API for the duration of a command; prefect must not be imported before.

    Args:
        home: the data directory of a server that is started here.
        module: a module that the command needs; it is imported while the server starts.

    Raises:
        PuzzleError: the server did not start.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "puzzle,puzzle_core")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    from prefect.settings import get_current_settings

    configured = get_current_settings().api.url
    if configured:
        yield configured
        return
    running = running_api(home)
    with contextlib.nullcontext(running) if running else own_server(home, free_port(), module) as url:
        from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH, temporary_settings

        with temporary_settings({PREFECT_API_URL: url, PREFECT_LOCAL_STORAGE_PATH: home.resolve() / "storage"}):
            started = datetime.datetime.now(datetime.UTC)
            try:
                yield url
            finally:
                _wait_for_rows(started)


@contextlib.contextmanager
def own_server(home: Path, port: int, module: str | None = None) -> Iterator[str]:
    """A Prefect server on loopback that ends with this process.

    Args:
        home: its data directory.
        port: its port.
        module: a module to import while it starts.

    Raises:
        PuzzleError: it did not respond within START_SECONDS; its log is in `home`.
    """
    home = home.resolve()
    address = f"http://127.0.0.1:{port}"
    command, environment = server_command(home, port)
    with (home / "server.log").open("ab") as output, (home / "starting").open("ab") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)  # two servers that create or migrate one database at once damage it
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            umask=0o077,
            preexec_fn=_die_with_parent,
        )
        try:
            if module:
                with lasting_imports():
                    importlib.import_module(module)
            _wait_until_healthy(process, address, home)
        except BaseException:
            _end(process)
            raise
    try:
        yield f"{address}/api"
    finally:
        _end(process)


def running_api(home: Path) -> str | None:
    """The URL of the API of a server that `make up` runs over this data directory, if it responds."""
    with contextlib.suppress(OSError, ValueError):
        url = (home / RUNNING).read_text()
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return url if answer.status == 200 else None
    return None


def server_command(home: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """The command of a server on loopback with its data in `home`, and the environment variables to add."""
    home = home.resolve()
    private_directory(home)
    environment = SETTINGS | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins(port)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return [sys.executable, "-m", "flows.services.server_app", str(port)], environment


def free_port() -> int:
    """A free TCP port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _die_with_parent() -> None:
    """On Linux, let the kernel end the server when the command ends; a new session keeps SIGINT from the server."""
    os.setsid()
    end_with_parent(signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise PuzzleError(f"the Prefect server did not start (exit code {process.poll()}); see {home / 'server.log'}")


def _wait_for_rows(since: datetime.datetime, longest_seconds: float = 10) -> None:
    """Wait until the server has stored all log lines and task runs since then: it does so a moment after they end."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=longest_seconds)
    recent = {"flow_runs": {"start_time": {"after_": since.isoformat()}}}
    unfinished = {"task_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
    deadline, counts = time.monotonic() + longest_seconds, [-1]
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            waiting = client.request("POST", "/task_runs/count", json=recent | unfinished).json()
            counts.append(client.request("POST", "/task_runs/count", json=recent).json())
            if waiting == 0 and counts[-1] == counts[-2]:
                return
            time.sleep(1)
