"""Keys and names of files: none leads out of its directory, whoever wrote it into the store."""

import json
import time
import uuid

import pytest

from puzzle_core.errors import ArtifactError, SpecError
from tasks.store.garbage import Inventory, collect_garbage
from tasks.store.manifest import Manifest, check_key
from tasks.store.store import MANIFEST, Store
from tests.tasks.store.test_store import PlainRecord, PlainWork

DIGEST = "0" * 40
OUT = ["../x", "../../etc/passwd", "/etc/passwd", f"bld/v1/../{DIGEST}", f"bld/v1/{DIGEST}/..", f"bld/v1/{DIGEST}\n"]
OUT += [f"../v1/{DIGEST}", f"bld/v1/{DIGEST}/record.json", "", f"bld\\v1\\{DIGEST}"]


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    """A store of every kind with one artifact."""
    roots = {
        "local": lambda: str(tmp_path / "stores" / "store"),
        "memory": lambda: f"memory://{uuid.uuid4().hex}/store",
        "s3": lambda: f"{request.getfixturevalue('bucket')}/store",
    }
    made = Store(roots[request.param](), tmp_path / "cache")
    publish(made)
    return made


def publish(store):
    work = PlainWork(number=1)
    with store.staging() as staged:
        (staged / "weights.bin").write_text("weights")
        store.publish(work, PlainRecord(), staged, "a test")
    return work.key


@pytest.mark.parametrize("key", OUT)
def test_what_is_no_key_is_neither_read_nor_removed(key, store, tmp_path):
    beside = tmp_path / "stores" / "x"
    beside.mkdir(parents=True)
    (beside / MANIFEST).write_text("{}")
    for act in (check_key, store.manifest, store.fetch, store.delete):
        with pytest.raises(SpecError, match="is no key of an artifact"):
            act(key)
    assert (beside / MANIFEST).exists()


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/passwd", "a/../../b", "..\\weights.bin"])
def test_a_record_that_names_files_elsewhere_is_refused(name, store, tmp_path):
    key = publish(store)
    content = store.manifest(key).model_dump(mode="json")
    content["files"] = {name: content["files"]["weights.bin"]}
    with pytest.raises(ValueError, match="leaves the artifact's directory"):
        Manifest.model_validate(content)
    if store.is_local:
        (tmp_path / "stores" / "store" / key / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match="damaged"):
            Store(store.url, tmp_path / "cache").fetch(key)


def test_objects_whose_names_lead_out_are_no_artifacts_and_are_written_nowhere(s3, bucket, tmp_path):
    """Such objects are made by hand: clients of the store's kind cannot even name them."""
    cache = tmp_path / "home" / "cache"
    store = Store(f"{bucket}/store", cache)
    key, (name, _, prefix) = publish(store), bucket.removeprefix("s3://").partition("/")
    text = store.manifest(key).model_copy(update={"key": f"../../v1/{DIGEST}"}).model_dump_json()
    for odd in (f"../../v1/{DIGEST}", f"bld/v1/..{DIGEST}", f"bld/v1/{DIGEST}/deeper"):
        s3.client().put_object(Bucket=name, Key=f"{prefix}/store/{odd}/{MANIFEST}", Body=text.encode())
    fresh = Store(f"{bucket}/store", cache)
    assert fresh.keys() == {key}
    inventory = Inventory.of(fresh)
    assert inventory.artifacts.keys() == {key}
    assert len(inventory.strays) == 3
    collect_garbage(fresh, time.time() + 100 * 86_400, 1.0, dry_run=False)
    assert fresh.keys() == {key}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["cache"]
