"""Secrets planted in a run's environment are in nothing that it leaves, and what it leaves is never a pickle."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from flows.puzzle import puzzle
from puzzle_core.errors import StorageError
from tests.workflow import publish_costs, write_spec

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


def test_the_search_sees_a_secret_in_every_form():
    secret = "planted/secret+of ours"
    texts = [secret, f"http://user:{quote(secret, safe='')}@host", json.dumps({"key": secret})]
    texts += [base64.b64encode((" " * shift + secret + "tail").encode()).decode() for shift in range(3)]
    for text in texts:
        assert holders([secret], {"file": text.encode()}), text
    assert not holders([secret], {"file": b"planted, but another secret of ours"})


@pytest.mark.slow
def test_no_secret_is_in_what_runs_leave_and_nothing_is_a_pickle(
    spec_of, prefect_server, s3, bucket, tmp_path, tmp_path_factory, monkeypatch, caplog
):
    tracking = f"sqlite:///{tmp_path}/tracking/mlflow.db"
    spec = spec_of(runtime={"store": bucket, "mlflow_uri": tracking})
    publish_costs(spec)
    done = run_with_secrets(write_spec(spec, tmp_path / "spec.yaml"), prefect_server, tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plantedwrongsecret")
    failing, said = (
        (bucket, "the secret key does not fit") if s3.kind == "ceph" else ("s3://no-such-bucket/a", "bucket")
    )
    elsewhere = spec_of(runtime={"store": failing, "mlflow_uri": tracking, "scratch": str(tmp_path / "elsewhere")})
    with caplog.at_level("DEBUG"), pytest.raises(StorageError, match=said):  # moto takes any secret
        puzzle(elsewhere)

    server = next(tmp_path_factory.getbasetemp().glob("prefect*"))
    stored = objects(s3, bucket)
    left = files(tmp_path, server) | stored | {"log": caplog.text.encode(), "out": done.stdout, "err": done.stderr}
    assert len(stored) > 80
    for name in ("tracking/mlflow.db", "report.html", "results/", "store-cache/", "storage/"):
        assert [path for path in left if name in path], name
    assert any(spec.name.encode() in data for path, data in left.items() if Path(path).name.startswith("prefect.db"))
    secrets = [*PLANTED.values(), s3.secret, "plantedwrongsecret", "plantedprefectpassword"]
    assert holders(secrets, left) == set()

    assert {Path(name).suffix for name in stored} <= STORED
    assert [name for name, data in stored.items() if data.startswith(PICKLES)] == []
    results = files(tmp_path / "results", server / "storage")  # of tasks, and of the flow that failed
    assert len(results) > 20
    assert [name for name, data in results.items() if not json.loads(data)] == []
    assert [name for name, data in results.items() if b'"type":"pickle"' in data] == []
