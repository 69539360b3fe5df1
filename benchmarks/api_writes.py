"""API writes beside a run, by the server's database: how many a Prefect server refuses, and how long they take.

    python -m benchmarks.api_writes --writes 200

For each database `puzzle up` starts the services in a directory of its own. While a library of a small parent is built
by a run of the deployment, several clients write as a person's clicks do: each creates a flow run and cancels it. On
SQLite the server answers some with 503; on PostgreSQL none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from flows.services.prefect_server import ROOT, free_port
from puzzle_core.report.report_tables import Table, format_text

CLIENTS = 8


class Outcome(NamedTuple):
    """Status and seconds of every write, and the state that the run beside it ended in."""

    writes: list[tuple[int, float]]
    state: str


class Api:
    """A Prefect API as the UI uses it."""

    def __init__(self, port: int):
        self._url = f"http://127.0.0.1:{port}/api"

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request, never repeated: its status and its answer."""
        headers = {"content-type": "application/json"} | ({} if method == "GET" else self._token())
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", method=method, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def _token(self) -> dict[str, str]:
        client = uuid.uuid4().hex  # a client has one token at a time
        with urllib.request.urlopen(f"{self._url}/csrf-token?client={client}", timeout=120) as answer:
            return {"Prefect-Csrf-Token": json.loads(answer.read())["token"], "Prefect-Csrf-Client": client}


def services(action: str, place: Path, *options: str) -> None:
    """`puzzle up` or `puzzle down` in a directory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "flows.cli", action, *options]
    subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)


def measure(database: str, writes: int, parameters: dict[str, Any]) -> Outcome:
    """Start the services over this database, a run, and the writes beside it."""
    with tempfile.TemporaryDirectory() as directory:
        place, port = Path(directory), free_port()
        for name in ("deployments", "prefect.yaml"):
            (place / name).symlink_to(ROOT / name)
        ports = ("--prefect-port", str(port), "--mlflow-port", str(free_port()))
        services("up", place, *ports, "--database", database)
        try:
            return _beside_a_run(Api(port), writes, parameters)
        finally:
            services("down", place)


def _beside_a_run(api: Api, writes: int, parameters: dict[str, Any]) -> Outcome:
    found = {deployment["name"]: deployment for deployment in api.call("POST", "/deployments/filter", {})[1]}
    start = "/deployments/{}/create_flow_run"
    library, targets = (start.format(found[name]["id"]) for name in ("build-library", "research-targets"))
    status, run = api.call("POST", library, {"parameters": parameters})
    assert status == 201, run
    while api.call("GET", f"/flow_runs/{run['id']}")[1]["state"]["type"] in ("SCHEDULED", "PENDING"):
        time.sleep(0.5)

    def write(number: int) -> list[tuple[int, float]]:
        started = time.perf_counter()
        status, made = api.call(
            "POST", targets, {"state": {"type": "SCHEDULED", "state_details": {}}, "parameters": {}}
        )
        answers = [(status, time.perf_counter() - started)]
        if status == 201:
            started = time.perf_counter()
            state = {"state": {"type": "CANCELLED"}}
            status, _ = api.call("POST", f"/flow_runs/{made['id']}/set_state", state)
            answers.append((status, time.perf_counter() - started))
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for both in pool.map(write, range(writes // 2)) for answer in both]
    while (state := api.call("GET", f"/flow_runs/{run['id']}")[1]["state"])["type"] in ("RUNNING", "PENDING"):
        time.sleep(1)
    return Outcome(answers, state["type"])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writes", type=int, default=200)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--spec", type=Path, help="specification (JSON) of the run; the deployment's by default")
    options = parser.parse_args()
    parameters = {"spec": json.loads(options.spec.read_text())} if options.spec else {}
    rows = []
    for database in options.databases:
        outcome = measure(database, options.writes, parameters)
        seconds = sorted(seconds for _, seconds in outcome.writes)
        refused = Counter(str(status) for status, _ in outcome.writes if status >= 300)
        named = ", ".join(f"{count} of {status}" for status, count in sorted(refused.items())) or "none"
        times = (f"{seconds[len(seconds) // 2]:.2f} s", f"{seconds[-1]:.2f} s")
        rows.append((database, str(len(outcome.writes)), named, *times, outcome.state))
        sys.stderr.write(f"{rows[-1]}\n")
    columns = ("database", "writes", "refused", "median", "longest", "the run beside them")
    sys.stdout.write(format_text(Table(title="API writes beside a run", columns=columns, rows=tuple(rows))) + "\n")


if __name__ == "__main__":
    main()
