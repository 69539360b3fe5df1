"""A form chooses among what the worker allows; a command names what it wants."""

import json
import socket

import pytest
from prefect.client.orchestration import get_client

from flows.build_library import build_library
from flows.permissions import ALLOWED, GUARDED, permitted, permitted_store
from puzzle_core.errors import SpecError
from puzzle_core.spec import RuntimeSpec
from tests.workflow import artifacts

FOREIGN = {
    "runtime.store": "s3://elsewhere/puzzle",
    "runtime.scratch": "/etc/puzzle",
    "runtime.mlflow_uri": "http://elsewhere:5000",
    "runtime.dask_address": "tcp://elsewhere:8786",
    "runtime.gkd_rendezvous": "elsewhere:29500",
    "parent.allow_remote_code": "tokenization_x.XTokenizer",
    "evaluation.lm_eval.task_folder": "/home/else/tasks",
}
PLACES = {name: RuntimeSpec().model_dump()[name] for name in ("store", "scratch", "mlflow_uri")}


@pytest.fixture
def by_worker(monkeypatch):
    """This process is the one of a run that a worker has started."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "any")
    monkeypatch.delenv(ALLOWED, raising=False)


def asked(spec_of, key, value):
    """A spec with the places of a form that was left as it is, but for one key."""
    part, *between, name = key.split(".")
    runtime = PLACES | ({"task_runner": "dask"} if name == "dask_address" else {})
    changes = {"runtime": runtime}
    place = changes.setdefault(part, {})
    for between_name in between:
        place = place.setdefault(between_name, {})
    place[name] = value
    return spec_of(**changes)


def test_every_guarded_key_is_tried():
    assert set(GUARDED) == set(FOREIGN)


def test_a_form_that_asks_for_a_store_alone_is_held_to_the_same(by_worker, monkeypatch):
    with pytest.raises(SpecError, match=f"runtime.store is 's3://elsewhere/puzzle'.*{ALLOWED}"):
        permitted_store(FOREIGN["runtime.store"])
    monkeypatch.setenv(ALLOWED, json.dumps({"runtime.store": [FOREIGN["runtime.store"]]}))
    assert permitted_store(FOREIGN["runtime.store"]) == FOREIGN["runtime.store"]
    assert permitted_store(PLACES["store"]) == FOREIGN["runtime.store"]


@pytest.mark.parametrize("key", FOREIGN)
def test_a_run_of_a_worker_names_only_what_the_worker_allows(spec_of, by_worker, monkeypatch, key):
    spec = asked(spec_of, key, FOREIGN[key])
    with pytest.raises(SpecError, match=f"(?s){key}.*{ALLOWED}"):
        permitted(spec)
    monkeypatch.setenv(ALLOWED, json.dumps({other: [FOREIGN[key]] for other in GUARDED if other != key}))
    with pytest.raises(SpecError, match=key):
        permitted(spec)
    monkeypatch.setenv(ALLOWED, json.dumps({key: ["another", FOREIGN[key]]}))
    assert permitted(spec) == spec


@pytest.mark.parametrize("key", FOREIGN)
def test_a_command_names_anything(spec_of, monkeypatch, key):
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    spec = asked(spec_of, key, FOREIGN[key])
    assert permitted(spec) is spec


def test_a_form_left_as_it_is_gets_the_places_of_the_worker_and_no_code_or_peer(spec_of, by_worker, monkeypatch):
    spec = spec_of(runtime=PLACES)
    assert permitted(spec) == spec
    monkeypatch.setenv(ALLOWED, json.dumps({key: ["/below/*", value] for key, value in FOREIGN.items()}))
    found = permitted(spec)
    assert found.runtime.store == FOREIGN["runtime.store"]
    assert found.runtime.scratch == FOREIGN["runtime.scratch"]
    assert found.runtime.mlflow_uri == FOREIGN["runtime.mlflow_uri"]
    assert (found.runtime.dask_address, found.parent.allow_remote_code) == (None, None)


@pytest.mark.parametrize(
    ("store", "allowed"),
    [
        ("s3://artifacts/team/a", True),
        ("s3://artifacts/team/", False),
        ("s3://artifacts/team", False),
        ("s3://artifacts/teams/a", False),
        ("s3://artifacts/team/../a", False),
        ("s3://artifacts/team/a/..", False),
        ("s3://artifacts/team/a b", False),
    ],
)
def test_a_place_below_an_allowed_one(spec_of, by_worker, monkeypatch, store, allowed):
    monkeypatch.setenv(ALLOWED, '{"runtime.store": ["s3://artifacts/team/*"]}')
    spec = asked(spec_of, "runtime.store", store)
    if allowed:
        assert permitted(spec) == spec
    else:
        with pytest.raises(SpecError, match=r"runtime\.store"):
            permitted(spec)


@pytest.mark.parametrize("text", ["{", "[]", '{"store": ["a"]}', '{"runtime.store": "a"}', '{"runtime.store": [1]}'])
def test_a_worker_with_a_wrong_list_runs_nothing(spec_of, by_worker, monkeypatch, text):
    monkeypatch.setenv(ALLOWED, text)
    with pytest.raises(SpecError, match=ALLOWED):
        permitted(spec_of(runtime=PLACES))


@pytest.mark.fault("a request that names a foreign scheduler", "a deployment's run with `runtime.dask_address`")
def test_a_foreign_scheduler_is_never_asked(spec_of, prefect_server, by_worker, tmp_path, monkeypatch, outcome):
    with socket.create_server(("127.0.0.1", 0)) as scheduler:
        scheduler.settimeout(0.1)
        address = f"tcp://127.0.0.1:{scheduler.getsockname()[1]}"
        spec = asked(spec_of, "runtime.dask_address", address)
        monkeypatch.chdir(tmp_path)
        with get_client(sync_client=True) as client:
            deployed = client.create_deployment(flow_id=client.create_flow(build_library), name="foreign scheduler")
            run = client.create_flow_run_from_deployment(deployed, parameters={"spec": spec.model_dump(mode="json")})
            monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run.id))
            with pytest.raises(SpecError, match=f"(?s)dask_address.*{ALLOWED}"):
                build_library(spec)
            client.delete_deployment(deployed)
        with pytest.raises(TimeoutError):
            scheduler.accept()
    assert artifacts(tmp_path / "store") == {}
    assert not (tmp_path / ".puzzle/store").exists()
    outcome(run="refused before any work; says what to set on the worker", store="untouched", shown="Failed; none open")
