"""Fixtures of stores in a bucket: a real S3 server where one is installed, and a proxy before it that does harm.

A pytest plugin (named in conftest.py). `PUZZLE_TEST_S3=moto` takes the mock where both are there.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.store import bucket as bucket_module
from tasks.store.store import Store
from tests.s3_proxy import Proxy, faulty_proxy
from tests.s3_server import BUCKET, S3Server, available, s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests of this session, with an empty bucket."""
    kind = os.environ.get("PUZZLE_TEST_S3") or available()
    if not kind:
        pytest.skip("no S3 server to be had: install Ceph's packages (docs/operations.md), or moto")
    with s3_server(kind, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in the bucket; credentials are in the environment."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stores opened from now on reach the server through."""
    with faulty_proxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores give up soon."""
    monkeypatch.setattr(bucket_module, "RETRY_SECONDS_AFTER_ANSWER", 1.0)
    monkeypatch.setattr(bucket_module, "RETRY_SECONDS_NEVER_ANSWERED", 0.5)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def opened(bucket: str, tmp_path: Path) -> Callable[..., Store]:
    """The same store as another machine sees it, each time: nothing remembered, a cache of its own."""
    return lambda **options: Store(bucket, tmp_path / f"cache-{uuid.uuid4().hex}", **options)
