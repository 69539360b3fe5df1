"""Goes through the UIs as a user does, in a headless browser, and saves a screenshot of every page.

    python -m benchmarks.ui_walk --images docs/images [--place DIR] [--set KEY=VALUE]

Starts the services (as `make up` does) on ports of their own, opens the form of the deployment `puzzle` in Prefect's UI
and submits it as it is, with the quickstart's parameters; waits for the run; looks at its tasks, its artifacts and the
schedule of new targets, and then at the child in MLflow. `--set` fills other values into the form. In a directory
that has a store, more of the run is cached.

Needs Debian's chromium (`apt-get install chromium`) and `pip install '.[ui]'`.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from flows.services.prefect_server import free_port
from flows.services.up import Ports, down, up
from puzzle_core.errors import PuzzleError
from puzzle_core.report.report_tables import Table, format_text

REPOSITORY = Path(__file__).parents[1]
BROWSER = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
CLIENT = "ui-walk"
SETTLE_MS = 4000
"""For a page to draw what it has fetched."""
SUBMIT_SECONDS = 60


class Walk:
    """A browser window, the services it looks at, and where its pictures go."""

    def __init__(self, page: Page, ports: Ports, images: Path):
        self.page, self.images = page, images
        self.prefect, self.mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        self.stops: list[tuple[str, str, str]] = []

    def ask(self, path: str, body: dict[str, Any] | None = None, server: str = "") -> Any:
        """One call of an API, for what a person reads off the page: names and states."""
        data, headers = None if body is None else json.dumps(body).encode(), {"content-type": "application/json"}
        if data and not server:  # Prefect's server takes no POST without a token, as the UI asks for one
            token = self.ask(f"/csrf-token?client={CLIENT}")["token"]
            headers |= {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": CLIENT}
        request = urllib.request.Request(f"{server or self.prefect + '/api'}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def look(self, name: str, address: str, wanted: str) -> None:
        """Open a page, wait for words on it, and take a picture."""
        self.page.goto(address)
        self.picture(name, wanted)

    def picture(self, name: str, wanted: str) -> None:
        """A picture of the window, once these words are on the page."""
        self.page.get_by_text(wanted).first.wait_for(state="attached")
        self.page.wait_for_timeout(SETTLE_MS)
        file = self.images / f"{name}.png"
        self.page.screenshot(path=file)
        Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)
        self.stops.append((name, wanted, f"{file.stat().st_size / 1024:.0f} KiB"))

    def start_run(self, changes: list[str]) -> str:
        """Submit the form of the deployment `puzzle`; the id of the flow run.

        Raises:
            PuzzleError: no run has started.
        """
        deployment = self.ask("/deployments/name/puzzle/puzzle")
        address = f"{self.prefect}/deployments/deployment/{deployment['id']}/run"
        if changes:
            values = deployment["parameters"]
            for change in changes:
                apply(values["spec"], change)
            address += f"?parameters={quote(quote(json.dumps(values)))}"
            self.page.goto(address)
        else:
            self.page.goto(address.removesuffix("/run"))
            self.page.get_by_role("button", name="Run", exact=True).click()
            self.page.get_by_text("Custom run").click()
        self.picture("form", "Name of the one class that the checkpoint's own code may define")
        asked = {"deployments": {"id": {"any_": [deployment["id"]]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
        before = self.ask("/flow_runs/filter", asked)
        self.page.get_by_role("button", name="Submit").click()
        deadline = time.monotonic() + SUBMIT_SECONDS
        while (found := self.ask("/flow_runs/filter", asked)) == before:
            if time.monotonic() > deadline:
                raise PuzzleError(f"the form started no run within {SUBMIT_SECONDS} s: see the page in a browser")
            self.page.wait_for_timeout(1000)
        return str(found[0]["id"])

    def wait(self, run: str, longest_s: float) -> None:
        """Wait until the run has ended.

        Raises:
            PuzzleError: it did not end well, or not in time.
        """
        deadline, state = time.monotonic() + longest_s, {"type": "", "message": ""}
        while state["type"] not in ENDED and time.monotonic() < deadline:
            time.sleep(2)
            state = self.ask(f"/flow_runs/{run}")["state"]
        if state["type"] != "COMPLETED":
            raise PuzzleError(f"the run is {state['type'] or 'not known'}: {state['message']}")

    def look_at_prefect(self, run: str) -> None:
        """The run with its tasks, what it shows of its results, and the schedule."""
        self.look("run", f"{self.prefect}/runs/flow-run/{run}", "Completed")
        artifacts = self.ask("/artifacts/latest/filter", {"limit": 200})
        spec = self.ask(f"/flow_runs/{run}")["parameters"]["spec"]
        keys = {"architecture": f"architecture-{spec['name']}-this-machine-", "child": f"child-{spec['name']}"}
        for kind, wanted in (("architecture", "solution 1"), ("child", "top-1 accuracy")):
            found = next(artifact["latest_id"] for artifact in artifacts if artifact["key"].startswith(keys[kind]))
            self.look(kind, f"{self.prefect}/artifacts/artifact/{found}", wanted)
        schedule = self.ask("/deployments/name/research-targets/research-targets")
        self.look("schedule", f"{self.prefect}/deployments/deployment/{schedule['id']}", "Schedules")

    def look_at_mlflow(self) -> None:
        """The child, by its page among the models of the experiment, and the curves of its distillation."""
        api = f"{self.mlflow}/api/2.0/mlflow"
        experiment = self.ask("/experiments/get-by-name?experiment_name=puzzle", server=api)["experiment"]
        where = f"{self.mlflow}/#/experiments/{experiment['experiment_id']}"
        asked = {"experiment_ids": [experiment["experiment_id"]], "filter": "name LIKE 'child-%'"}
        child = self.ask("/logged-models/search", asked, server=api)["models"][0]["info"]
        run = f"{where}/runs/{child['source_run_id']}"
        self.page.goto(run)  # MLflow opens with its assistant, and with what it has for agents
        self.page.get_by_role("button", name="Close").click()
        self.page.get_by_role("button", name="Model training").click()
        self.page.wait_for_timeout(SETTLE_MS)
        self.look("mlflow-child", f"{where}/models/{child['model_id']}", child["name"])
        self.look("mlflow-gkd", f"{run}/model-metrics", "kl_nats_per_token")


def apply(spec: dict[str, Any], change: str) -> None:
    """Set one value of the form, given as key.path=value."""
    path, _, value = change.partition("=")
    *parents, last = path.split(".")
    for part in parents:
        spec = spec.setdefault(part, {})
    spec[last] = yaml.safe_load(value)


@contextlib.contextmanager
def services(place: Path) -> Iterator[Ports]:
    """What `make up` starts, in a place of its own."""
    ports = Ports(free_port(), free_port())
    for name in ("prefect.yaml", "deployments"):
        if not (place / name).exists():
            (place / name).symlink_to(REPOSITORY / name)
    up(place, ports)
    try:
        yield ports
    finally:
        down(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--place", type=Path, metavar="DIR", help="where the services keep their data; default: gone")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--wait", type=float, default=3600, metavar="SECONDS", help="for the run (default %(default)s)")
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        place = options.place or Path(temporary) / "place"
        place.mkdir(parents=True, exist_ok=True)
        with services(place) as ports:
            browser = playwright.chromium.launch_persistent_context(
                Path(temporary) / "profile",
                executable_path=shutil.which("chromium"),
                args=list(BROWSER),
                viewport={"width": 1280, "height": 860},
            )
            browser.set_default_timeout(60_000)
            walk = Walk(browser.new_page(), ports, options.images)
            started = time.monotonic()
            run = walk.start_run(options.changes)
            walk.wait(run, options.wait)
            ended = time.monotonic()
            walk.look_at_prefect(run)
            walk.look_at_mlflow()
            browser.close()
    note = f"The run, from the form to its end: {ended - started:.0f} s."
    table = Table(title="Stops", columns=("picture", "seen", "size"), rows=tuple(walk.stops), note=note)
    sys.stdout.write(f"{format_text(table)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
