"""Machines that share a bucket and nothing else: processes with directories, scratch and locks of their own.

A lease tells such processes from those of one machine only by their names, so each says that it is another host.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from flows.permissions import ALLOWED
from flows.services.prefect_server import free_port, own_server
from puzzle_core.spec import parse_spec
from tasks.runtime.context import RunContext
from tests.faults import ROOT
from tests.workflow import SCORED, TRAINED, merged, of_stage, write_spec

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
COMMAND = """
import sys
from tasks.runtime import lease, process

name, lease.EXPIRY_SECONDS = sys.argv[1], float(sys.argv[2])
lease.this_process = lambda: f"{name} machine boot pid:[1] 1 1"
from flows.cli.main import main

sys.exit(main(sys.argv[3:]))
"""


class Machine:
    """A directory with everything that a machine has of its own, and the process that runs there."""

    def __init__(self, place, api):
        self.place, self.name = place, place.name
        place.mkdir()
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": api}
        self.environment |= {"PUZZLE_LOCK_DIR": str(place / "locks"), "TMPDIR": str(place)}
        self.environment |= {"PREFECT_LOCAL_STORAGE_PATH": str(place / "results"), "PREFECT_HOME": str(place / "home")}

    def start(self, *command, **environment):
        with (self.place / "said").open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=self.place, env=self.environment | environment,
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self):
        return (self.place / "said").read_text()


@pytest.fixture
def machines(tmp_path, bucket, proxy, content, prefect_server):
    """Two machines over one bucket, behind a proxy that counts, and the spec that both are given."""
    values = {name: part for name, part in content.items() if name != "runtime"}
    file = write_spec(merged(values, {"name": "machines", "runtime": {"store": bucket}}), tmp_path / "spec.yaml")
    two = [Machine(tmp_path / name, prefect_server) for name in ("one", "two")]
    yield *two, file
    for machine in two:
        machine.kill()


def records(store):
    """The tag of every artifact's record, by path."""
    return {path: status.tag for path, status in store.listing().items() if path.endswith("/record.json")}


def made(proxy):
    """How often each training and each score was stored, by the uploads of their records."""
    puts = [request.path.split("?")[0] for request in proxy.requests if request.method == "PUT"]
    keys = ["/".join(path.split("/")[-4:-1]) for path in puts if path.endswith("/record.json")]
    return {stage: Counter(of_stage_list(keys, stage)) for stage in ("bld", "score")}


def of_stage_list(keys, stage):
    return [key for key in keys if key.startswith(f"{stage}/")]


@pytest.mark.fault("two machines over one bucket at once", "two `puzzle build-library`, only a bucket shared")
def test_two_machines_that_start_together_do_nothing_twice(machines, proxy, outcome):
    one, two, file = machines
    for machine in (one, two):
        machine.start("-c", COMMAND, machine.name, 60, "build-library", file)
    assert [machine.process.wait() for machine in (one, two)] == [0, 0], one.said + two.said
    times = made(proxy)
    assert {stage: (len(keys), max(keys.values())) for stage, keys in times.items()} == {
        "bld": (TRAINED, 1), "score": (SCORED, 1)
    }  # fmt: skip
    assert "waiting for another machine" in one.said + two.said
    outcome(
        run="both end right; one waits for what the other is at",
        store=f"{TRAINED} trainings and {SCORED} scores, none twice",
    )


@pytest.mark.fault("a machine dies that others wait for", "SIGKILL to one of two as it trains; leases of 4 s for 60")
def test_what_a_killed_machine_was_at_is_taken_over(machines, bucket, proxy, outcome):
    one, two, file = machines
    store = RunContext.of(parse_spec(json.loads(file.read_text()), "test")).store()
    one.start("-c", COMMAND, one.name, 4, "build-library", file)
    while not any(path.startswith("leases/bld/") for path in store.listing("leases")):
        assert one.process.poll() is None, one.said
        time.sleep(0.02)
    one.kill()
    held = [path for path in store.listing("leases") if path.startswith("leases/bld/")]
    assert held
    before = records(store)
    two.start("-c", COMMAND, two.name, 4, "build-library", file)
    assert two.process.wait() == 0, two.said
    assert "taking over the work of a process that has ended" in two.said
    assert {stage: len(of_stage(store.keys(), stage)) for stage in ("bld", "score")} == {
        "bld": TRAINED, "score": SCORED
    }  # fmt: skip
    after = records(store)
    assert {key: after[key] for key in before} == before
    assert not store.listing("leases")
    outcome(
        run="the other takes over once the lease has expired, and ends right",
        store=f"what was finished is kept; {TRAINED} trainings and {SCORED} scores, no lease left",
    )


def test_ranges_of_layers_are_built_by_two_workers_over_one_bucket(content, tmp_path, bucket, proxy):
    home = tmp_path / "server"
    home.mkdir()
    with own_server(home, free_port()) as api, contextlib.ExitStack() as ending:
        two = [Machine(tmp_path / name, api) for name in ("one", "two")]
        values = {name: part for name, part in content.items() if name != "runtime"}
        values |= {"name": "ranges", "runtime": {"store": bucket}}
        run = [sys.executable, "-m", "prefect", "--no-prompt"]
        pool = [*run, "work-pool", "create", "puzzle", "--type", "process"]
        for command in (pool, [*run, "deploy", "--all"]):
            subprocess.run(command, cwd=ROOT, env=two[0].environment, check=True, capture_output=True)
        for machine in two:
            worker = ("-m", "prefect", "worker", "start", "--pool", "puzzle", "--name", machine.name, "--limit", "2")
            machine.start(*worker, **{ALLOWED: json.dumps({"runtime.store": [bucket]})})
            ending.callback(machine.kill)
        parameters = json.dumps({"spec": values, "ranges": 3})
        start = [*run, "deployment", "run", "fan-out-library/fan-out-library", "--params", parameters, "--watch"]
        done = subprocess.run(start, cwd=tmp_path, env=two[0].environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + two[0].said + two[1].said
    assert {stage: (len(keys), max(keys.values())) for stage, keys in made(proxy).items()} == {
        "bld": (TRAINED, 1), "score": (SCORED, 1)
    }  # fmt: skip
    assert all((machine.place / ".puzzle" / "scratch").exists() for machine in two)
