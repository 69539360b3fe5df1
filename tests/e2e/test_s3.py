"""The whole method over a store in a bucket: what it leaves, that it is done once, and what it asks of the server.

The run is the command with secrets planted in its environment: they are in nothing that it leaves, and what it leaves
is never a pickle.
"""

import base64
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from flows.puzzle import puzzle
from puzzle_core.errors import DamagedError, StorageError
from puzzle_core.spec import RunSpec, parse_spec
from tasks.runtime.context import RunContext
from tasks.store.store import MANIFEST, Store
from tests.s3_server import BUCKET
from tests.workflow import SCORED, TRAINED, Recorded, merged, of_stage, placed, plan_of, publish_costs, write_spec

BOOKKEEPING = {"open inputs", "check limits"}
ROOT = Path(__file__).parents[2]
PLANTED = {
    "PREFECT_API_KEY": "pnu_plantedprefectkey",
    "PREFECT_API_AUTH_STRING": "admin:plantedprefectpassword",
    "MLFLOW_TRACKING_USERNAME": "planted-tracking-user",
    "MLFLOW_TRACKING_PASSWORD": "planted/tracking+password",
    "MLFLOW_TRACKING_TOKEN": "plantedtrackingtoken",
    "HF_TOKEN": "hf_plantedhubtoken",
    "DATABASE_PASSWORD": "planteddatabasepassword",
}
STORED = {".json", ".safetensors", ".png", ".html", ".md", ".yaml", ".csv", ".txt", ".py", ".jinja"}
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How pickles and torch's archives of them begin."""


def run_with_secrets(file, api, place):
    """`puzzle run` as users have it, with every secret in its environment."""
    environment = os.environ | PLANTED | {"PREFECT_API_URL": api, "PYTHONPATH": str(ROOT)}
    environment |= {"PREFECT_LOCAL_STORAGE_PATH": str(place / "results"), "PREFECT_LOGGING_LEVEL": "DEBUG"}
    command = [sys.executable, "-m", "flows.cli", "--debug", "run", str(file)]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, check=False)


def forms(secret):
    """A secret as it is, and as addresses and encoded records would hold it."""
    plain = secret.encode()
    encoded = [base64.b64encode(b" " * shift + plain)[(4 * shift + 2) // 3 + 1 : -4] for shift in range(3)]
    return {plain, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), *encoded}


def holders(secrets, contents):
    """What holds a secret, by name."""
    wanted = set().union(*(forms(secret) for secret in secrets))
    return {(name, form) for name, data in contents.items() for form in wanted if form in data}


def files(*places):
    """Every file below some directories, whole."""
    return {str(path): path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}


def objects(server, url):
    """Every object below an s3:// URL, whole."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = server.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


class Whole(NamedTuple):
    """A whole run: its spec, the directory with all that it has outside the bucket, and what the command printed."""

    spec: RunSpec
    place: Path
    done: subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def whole(content, s3, prefect_server, tmp_path_factory):
    """A whole run over the bucket; for reading only."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3.environment.items():
            environment.setenv(name, value)
        url = {"runtime": {"store": f"s3://{BUCKET}/{uuid.uuid4().hex}"}}
        spec = parse_spec(merged(placed(content, place), url), "test")
        publish_costs(spec)
        done = run_with_secrets(write_spec(spec, place / "spec.yaml"), prefect_server, place)
    assert done.returncode == 0, done.stderr.decode()
    return Whole(spec, place, done)


@pytest.fixture
def spec(spec_of, bucket, proxy, prefect_server):
    """The pico run over an empty place in the bucket, through the proxy, with its costs there."""
    made = spec_of(runtime={"store": bucket})
    publish_costs(made)
    return made


def test_a_run_over_s3_is_whole_and_a_second_one_on_another_machine_computes_nothing(whole, spec_of, proxy):
    elsewhere = spec_of(runtime={"store": whole.spec.runtime.store})
    store = RunContext.of(elsewhere).store()
    keys = store.keys()
    assert (len(of_stage(keys, "bld")), len(of_stage(keys, "score"))) == (TRAINED, SCORED)
    assert {key: store.damage(key) for key in keys if store.damage(key)} == {}

    proxy.requests.clear()
    recorded = Recorded()
    puzzle(elsewhere)
    assert set(recorded.computed(at_least=15)) <= BOOKKEEPING
    assert not [request.path for request in proxy.requests if request.method in ("PUT", "POST", "DELETE")]
    assert store.keys() == keys
    listings = proxy.count("GET", "list-type=2")
    assert listings <= 20
    weights = [key for key in of_stage(keys, "bld") if proxy.count("GET", f"{key}/{store.manifest(key).place}")]
    assert weights == []
    looks = [request for request in proxy.requests if request.headers.get("Range") == "bytes=0-0"]
    assert not [request.path for request in looks if "/bld/" in request.path or "/score/" in request.path]


@pytest.mark.long
@pytest.mark.fault("an object is corrupted between two runs", "other bytes of the same size put in a block's place")
def test_a_damaged_block_is_made_again_within_the_run_where_the_spec_says_so(spec, tmp_path, outcome):
    puzzle(spec)
    plan, context = plan_of(spec)
    harmed = plan.all_bld()[0]
    store = context.store()
    manifest = store.manifest(harmed.key)
    name = next(name for name in manifest.files if name.endswith(".safetensors"))
    place = f"{spec.runtime.store.removeprefix('s3://')}/{harmed.key}/{manifest.place}/{name}"
    store._bucket.fs.pipe_file(place, b"X" * manifest.files[name].size_bytes)
    users = [work.key for work in plan.all_scores() if harmed.key in (work.attention, work.ffn)]
    for number, policy in enumerate(("refuse", "recompute")):
        for key in users:
            store.delete(key)
        changes = {"scratch": str(tmp_path / f"elsewhere-{number}"), "on_corruption": policy}
        elsewhere = spec.model_copy(update={"runtime": spec.runtime.model_copy(update=changes)})
        if policy == "refuse":
            with pytest.raises(DamagedError, match=f"{harmed.key}/{name} .* delete"):
                puzzle(elsewhere)
        else:
            puzzle(elsewhere)
    fresh = Store(spec.runtime.store, tmp_path / "fresh")
    assert fresh.damage(harmed.key) == {}
    assert all(fresh.has(key) for key in users)
    assert f"{harmed.key}/{MANIFEST}" in fresh.listing()
    outcome(
        run="on_corruption: refuse names it and stops; recompute makes it again and ends right",
        store=f"the block whole again, and the scores that use it ({len(users)}) made",
    )


def test_the_search_sees_a_secret_in_every_form():
    secret = "planted/secret+of ours"
    texts = [secret, f"http://user:{quote(secret, safe='')}@host", json.dumps({"key": secret})]
    texts += [base64.b64encode((" " * shift + secret + "tail").encode()).decode() for shift in range(3)]
    for text in texts:
        assert holders([secret], {"file": text.encode()}), text
    assert not holders([secret], {"file": b"planted, but another secret of ours"})


@pytest.mark.slow
def test_no_secret_is_in_what_runs_leave_and_nothing_is_a_pickle(
    whole, spec_of, s3, bucket, tmp_path, tmp_path_factory, monkeypatch, caplog
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plantedwrongsecret")
    failing, said = (
        (bucket, "the secret key does not fit") if s3.kind == "ceph" else ("s3://no-such-bucket/a", "bucket")
    )
    elsewhere = spec_of(runtime={"store": failing})
    server = next(tmp_path_factory.getbasetemp().glob("prefect*"))
    of_other_tests = files(server / "storage").keys()
    with caplog.at_level("DEBUG"), pytest.raises(StorageError, match=said):  # moto takes any secret
        puzzle(elsewhere)

    stored = objects(s3, whole.spec.runtime.store)
    log = {"log": caplog.text.encode(), "out": whole.done.stdout, "err": whole.done.stderr}
    left = files(tmp_path, whole.place, server) | stored | log
    assert len(stored) > 80
    for name in ("mlflow/mlflow.db", "report.html", "store-cache/"):
        assert [path for path in left if name in path], name
    assert any(
        whole.spec.name.encode() in data for path, data in left.items() if Path(path).name.startswith("prefect.db")
    )
    secrets = [*PLANTED.values(), s3.secret, "plantedwrongsecret", "plantedprefectpassword"]
    assert holders(secrets, left) == set()

    assert {Path(name).suffix or Path(name).name for name in stored} <= STORED | {"MLmodel"}
    assert [name for name, data in stored.items() if data.startswith(PICKLES)] == []
    results = files(whole.place / "results", server / "storage")  # of flows; none of tasks, whose results are keys
    results = {name: data for name, data in results.items() if name not in of_other_tests}
    assert [name for name, data in results.items() if not json.loads(data)] == []
    assert [name for name, data in results.items() if b'"type":"pickle"' in data] == []
