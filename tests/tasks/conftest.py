"""Stores of every kind."""

import uuid

import pytest

from tasks.store.store import Store


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    """A store of every kind; `memory://` takes the same way as buckets do."""
    root = {
        "local": lambda: str(tmp_path / "store"),
        "memory": lambda: f"memory://{uuid.uuid4().hex}",
        "s3": lambda: request.getfixturevalue("bucket"),
    }
    return Store(root[request.param](), tmp_path / "cache")
