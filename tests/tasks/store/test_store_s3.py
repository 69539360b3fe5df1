"""Stores in a bucket of a real S3 server: two writers, large files, damage, and a server or a network that fails."""

import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from puzzle_core.errors import ArtifactError, DamagedError, SpecError, StorageError
from puzzle_core.spec import RuntimeSpec
from tasks.store import bucket as store_bucket
from tasks.store import packs as store_packs
from tasks.store import store as store_module
from tasks.store.cache import pin_entries
from tasks.store.packs import PACKS
from tasks.store.store import MANIFEST, Store
from tests.s3_server import BUCKET
from tests.tasks.store.test_store import TEXT, PlainRecord, PlainWork, publish

WORK = PlainWork()
PART_BYTES, LARGE_BYTES = 5 * 2**20, 12 * 2**20
"""The smallest part that S3 takes, and a file of three parts."""
LEAST_RECORDS = 10


def objects(store, key=""):
    """The objects of an artifact in the bucket, by their path below it, and when they were written."""
    prefix = f"{store.url.removeprefix(f's3://{BUCKET}/')}/{key}"
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {found["Key"].removeprefix(prefix): found["LastModified"] for page in pages for found in page["Contents"]}


def uploads(store):
    """Uploads in parts that have not ended."""
    found = boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload for upload in found if upload["Key"].startswith(store.url.removeprefix(f"s3://{BUCKET}/"))]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Files of many parts that are small, and packs of few records: the product's sizes take minutes with a mock."""
    monkeypatch.setattr(store_bucket, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(store_bucket, "RANGE_BYTES", PART_BYTES // 2)
    monkeypatch.setattr(store_packs, "LEAST_RECORDS", LEAST_RECORDS)


def publish_large(store):
    with store.staging() as staged:
        (staged / "weights.bin").write_bytes(os.urandom(2**20) * (LARGE_BYTES // 2**20))
        store.publish(WORK, PlainRecord(), staged, "a test")
    return WORK.key


def is_whole(store):
    """Whether every byte in the bucket is what the record says."""
    return store.damage(WORK.key) == {}


def is_put(request):
    return request.method == "PUT"


def is_part(request):
    return request.method == "PUT" and "partNumber=" in request.path


def is_record(request):
    return request.method == "PUT" and request.path.endswith(MANIFEST)


def test_a_large_file_goes_in_parts_and_comes_back_whole(proxy, opened):
    key = publish_large(opened())
    assert proxy.count("PUT", "partNumber=") == 3
    fetched = opened().fetch(key) / "weights.bin"
    assert fetched.stat().st_size == LARGE_BYTES
    ranges = [request.headers["Range"] for request in proxy.requests if request.path.endswith("weights.bin")
              and request.method == "GET"]  # fmt: skip
    assert len(ranges) == 5
    assert not uploads(opened())


@pytest.mark.fault("six writers of one key at once on S3", "six threads, six stores, six different contents")
def test_writers_of_one_key_and_different_bytes_end_with_one_whole_artifact_and_nothing_beside(opened, proxy, outcome):
    stores = [opened() for _ in range(6)]

    def write(number):
        publish(stores[number], text=f"{number}" * 1000, made_by=str(number))

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        list(threads.map(write, range(6)))
    assert all(request.headers.get("If-None-Match") == "*" for request in proxy.requests if is_record(request))
    winner = opened().manifest(WORK.key)
    assert (opened().fetch(WORK.key) / "weights.bin").read_text() == winner.made_by * 1000
    files = {f"/{winner.place}/{name}" for name in winner.files}
    assert objects(opened(), WORK.key).keys() == {f"/{MANIFEST}", *files}
    outcome(
        run="all end; the first to write its record is the artifact",
        store="one whole artifact of one writer, nothing beside it",
    )


def test_who_comes_later_changes_nothing(opened):
    first = publish(opened(), made_by="first")
    before = objects(opened(), first)
    publish(opened(), text="something else under the same key", made_by="second")
    assert objects(opened(), first) == before
    assert opened().manifest(first).made_by == "first"


@pytest.mark.parametrize("where", [is_part, is_record], ids=["part", "record"])
@pytest.mark.fault("kill -9 of a writer as it sends a {id}", "SIGKILL while the proxy holds that PUT back")
def test_a_writer_killed_during_its_upload_leaves_nothing_and_the_next_one_makes_it_whole(
    opened, proxy, bucket, where, outcome
):
    script = (
        "import sys; from pathlib import Path; from tasks.store.store import Store\n"
        "from tests.tasks.store.test_store_s3 import PART_BYTES, publish_large, store_bucket\n"
        "store_bucket.PART_BYTES = PART_BYTES\n"
        "publish_large(Store(sys.argv[1], Path(sys.argv[2])))"
    )
    fault = proxy.inject("stall", times=99, matches=where)
    writer = subprocess.Popen([sys.executable, "-c", script, bucket, opened()._cache.directory])
    while not fault.done:
        assert writer.poll() is None
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    proxy.faults.clear()
    assert not opened().has(WORK.key)
    assert opened().keys() == set()
    publish_large(opened())
    assert is_whole(opened())
    outcome(run="the next writer makes it", store="no artifact after the kill; whole after the next")


@pytest.mark.parametrize("harm", ["500", "503 SlowDown", "503 ServiceUnavailable", "reset", "cut"])
@pytest.mark.fault(
    "the store answers {harm} for a while", "proxy before S3: six requests in a row, writing and reading"
)
def test_a_server_that_fails_for_a_while_is_waited_for(opened, proxy, harm, outcome):
    writer, reader = opened(), opened()
    assert writer.keys() == reader.keys() == set()
    for act in (lambda: publish(writer), lambda: reader.fetch(WORK.key)):
        fault = proxy.inject(harm, times=6)
        act()
        assert fault.done == 6
    assert is_whole(opened())
    outcome(run="asked again until it answers", store="whole")


@pytest.mark.parametrize("harm", ["reset", "503 SlowDown", "cut"])
@pytest.mark.fault("a part of a large upload is lost: {harm}", "proxy before S3: two of three parts")
def test_a_part_that_is_lost_is_sent_again(opened, proxy, harm, outcome):
    proxy.inject(harm, times=2, matches=is_part)
    publish_large(opened())
    assert is_whole(opened())
    assert not uploads(opened())
    outcome(run="the part is sent again", store="whole; no upload left open")


@pytest.mark.fault("the connection is lost in every part", "proxy before S3: resets after half of each part")
def test_an_upload_in_parts_that_fails_for_good_leaves_no_artifact(opened, proxy, impatient, outcome):
    proxy.inject("reset", times=999, matches=is_part)
    with pytest.raises(StorageError, match=r"no good answer for \d+ s .*check AWS_ENDPOINT_URL"):
        publish_large(opened())
    assert not opened().has(WORK.key)
    assert not uploads(opened())
    outcome(run="says how long it tried and what to check", store="no artifact, no upload left open")


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.fault("the store stalls on {method}", "proxy before S3: no answer, then a reset, twice")
def test_a_server_that_stalls_is_asked_again(opened, proxy, method, monkeypatch, outcome):
    store, fault = opened(), proxy.inject("stall", times=2, matches=lambda request: request.method == method)
    store._bucket.fs.read_timeout = 1
    publish(store)
    assert fault.done == 2
    assert is_whole(opened())
    outcome(run="asked again", store="whole")


@pytest.mark.fault("the store does not come back", "proxy before S3: 503 for ever")
def test_a_server_that_does_not_come_back_is_named(opened, proxy, impatient, outcome):
    store = opened()
    proxy.inject("503 ServiceUnavailable", times=999)
    with pytest.raises(StorageError) as caught:
        store.keys()
    for wanted in (store.url, proxy.endpoint, "ServiceUnavailable", "AWS_ENDPOINT_URL"):
        assert wanted in str(caught.value)
    outcome(run="names store, endpoint and what to check")


def test_an_endpoint_that_nobody_answers_at_is_named_soon(opened, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(store_bucket, "RETRY_SECONDS_AFTER_ANSWER", 10_000.0)  # of a server that answered before
    monkeypatch.setattr(store_bucket, "RETRY_SECONDS_NEVER_ANSWERED", 0.5)
    with pytest.raises(
        StorageError, match=r"at http://127.0.0.1:9: no good answer .* check AWS_ENDPOINT_URL"
    ) as caught:
        opened().has(WORK.key)
    assert "hidden" not in str(caught.value)


CREDENTIALS = {
    "unknown key": ("AWS_ACCESS_KEY_ID", "unknown", "does not know the access key"),
    "wrong secret": ("AWS_SECRET_ACCESS_KEY", "wrong", "secret key does not fit"),
}


@pytest.mark.parametrize("name", CREDENTIALS)
@pytest.mark.fault("credentials are wrong: {name}", "the real server refuses them")
def test_wrong_credentials_are_refused_without_repeating_them(s3, opened, name, monkeypatch, caplog, outcome):
    if s3.kind == "moto":
        pytest.skip("moto lets everybody in")
    variable, value, said = CREDENTIALS[name]
    monkeypatch.setenv(variable, value)
    for ask in (lambda store: store.keys(), lambda store: store.has(WORK.key), publish):
        with caplog.at_level(logging.DEBUG, "puzzle"), pytest.raises(StorageError, match=said) as caught:
            ask(opened())
        assert s3.endpoint in str(caught.value)
        assert s3.secret not in str(caught.value) + caplog.text
    outcome(run="refused at once, names what to correct, and no secret")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("400 ExpiredToken", r"have expired: renew them \(ExpiredToken\)"),
        ("403 AccessDenied", r"may not list there \(AccessDenied\)"),
        ("403 RequestTimeTooSkewed", "clock is wrong"),
    ],
)
def test_refusals_of_the_server_are_said_at_once(opened, proxy, harm, said):
    store = opened()
    assert store.keys() == set()
    fault = proxy.inject(harm, times=99)
    with pytest.raises(StorageError, match=said):
        store.keys()
    assert fault.done == 1


def test_no_credentials_at_all_are_said_with_what_to_set(opened, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"no credentials for s3://.*: set AWS_PROFILE"):
        opened().keys()


def test_credentials_and_endpoint_may_come_from_a_profile(s3, opened, monkeypatch, tmp_path):
    for name in s3.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    (tmp_path / "config").write_text(f"[profile ours]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n")
    secret = f"aws_secret_access_key = {s3.secret}"
    (tmp_path / "credentials").write_text(f"[ours]\naws_access_key_id = {s3.key}\n{secret}\n")
    assert (opened().fetch(publish(opened())) / "weights.bin").read_text() == TEXT


def test_a_bucket_that_is_not_there_is_named(bucket, tmp_path):
    store = Store("s3://no-such-bucket/prefix", tmp_path)
    for ask in (store.keys, lambda: publish(store)):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/prefix .*bucket does not exist: create it"):
            ask()


@pytest.mark.parametrize("url", ["s3://key:hidden@bucket/prefix", "s3://bucket/prefix?token=hidden"])
def test_a_url_with_credentials_is_refused_without_repeating_it(url, tmp_path):
    for make in (lambda: Store(url, tmp_path), lambda: RuntimeSpec(store=url)):
        with pytest.raises((SpecError, ValueError), match="holds credentials") as caught:
            make()
        assert "hidden" not in str(caught.value).split("input_value")[0]


DAMAGE = {
    "altered": (("W" + TEXT[1:]).encode(), "7,000 bytes, altered now"),
    "truncated": (TEXT[:100].encode(), "100 bytes now"),
    "deleted": (None, "nothing now"),
}


def harm_object(store, data):
    """Put other bytes in place of the weights, or none."""
    path = f"{WORK.key}/{store.manifest(WORK.key).place}/weights.bin"
    if data is None:
        store._bucket.remove([path])
    else:
        store._bucket.fs.pipe_file(f"{store.url.removeprefix('s3://')}/{path}", data)


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.fault("an object is {name}", "other bytes, fewer, or none put in its place")
def test_a_damaged_object_is_named_and_refused_and_stays(opened, name, outcome):
    publish(opened())
    data, said = DAMAGE[name]
    harm_object(opened(), data)
    with pytest.raises(DamagedError, match=rf"{WORK.key}/weights.bin in s3://.* {said}\): delete s3://.*/{WORK.key}"):
        opened().fetch(WORK.key)
    assert opened().has(WORK.key)
    assert opened().damage(WORK.key) == {"weights.bin": said.removesuffix(" now")}
    outcome(
        run="refused when it is read; names object, damage and what to do", store="refused whole; stays where it is"
    )


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_object_is_removed_and_made_again_where_the_spec_says_so(opened, name):
    publish(opened())
    harm_object(opened(), DAMAGE[name][0])
    store = opened(on_corruption="recompute")
    with pytest.raises(DamagedError, match=r"it was removed, as runtime\.on_corruption says; run again"):
        store.fetch(WORK.key)
    assert not opened().has(WORK.key)
    publish(store)
    assert (store.fetch(WORK.key) / "weights.bin").read_text() == TEXT
    assert is_whole(opened())


def test_a_record_that_points_out_of_its_directory_is_refused(opened, tmp_path):
    publish(opened())
    store = opened()
    place = f"{store.url.removeprefix('s3://')}/{WORK.key}/{MANIFEST}"
    text = store._bucket.fs.cat_file(place).decode()
    store._bucket.fs.pipe_file(place, text.replace("weights.bin", "../../../weights.bin").encode())
    with pytest.raises(ArtifactError, match=f"manifest of {WORK.key} .* damaged"):
        opened().fetch(WORK.key)


def test_an_artifact_made_anew_elsewhere_is_fetched_and_not_mixed_with_the_old_one(opened):
    store = opened()
    publish(store)
    store.fetch(WORK.key)
    other = opened()
    other.delete(WORK.key)
    publish(other, text="made anew")
    store._cache.drop(WORK.key)
    assert (store.fetch(WORK.key) / "weights.bin").read_text() == "made anew"


def test_what_was_published_here_is_not_fetched_and_one_artifact_is_fetched_alone(opened, proxy):
    store, works = opened(), [PlainWork(number=number) for number in range(4)]
    for work in works:
        publish(store, work, text="w" * 100_000)
    before = proxy.received_bytes
    assert (store.fetch(works[0].key) / "weights.bin").stat().st_size == 100_000
    assert proxy.received_bytes - before < 2_000
    (opened().fetch(works[1].key) / "weights.bin").read_bytes()
    assert proxy.received_bytes - before < 110_000


def test_records_take_a_listing_and_a_read_each_and_a_pack_takes_one(opened, proxy):
    store = opened()
    keys = {publish(store, PlainWork(number=number)) for number in range(LEAST_RECORDS)}
    reader = opened()
    proxy.requests.clear()
    assert reader.keys("plain") == keys
    assert len(proxy.requests) == 1
    found = reader.manifests(keys)
    assert found.keys() == keys
    assert len(proxy.requests) == 1 + 1 + LEAST_RECORDS  # the pack was asked for, and is not there
    reader.pack(keys)
    proxy.requests.clear()
    again = opened()
    again.keys("plain")
    assert again.manifests(keys) == found
    assert len(proxy.requests) == 2
    again.pack(keys)
    assert proxy.count("PUT") == 0


def test_a_pack_is_of_what_is_listed_and_of_nothing_else(opened):
    store = opened()
    works = [PlainWork(number=number) for number in range(LEAST_RECORDS + 1)]
    keys = [publish(store, work) for work in works]
    store.fetch(keys[0])  # reads its record before any listing has it
    store.pack(keys)
    assert len([path for path in store.listing() if path.startswith(PACKS)]) == 1
    fewer, reader = keys[1:], opened()
    reader.keys("plain")
    assert reader.manifests(fewer).keys() == set(fewer)
    with store.staging() as staged:
        (staged / "weights.bin").write_text("made anew")
        store.delete(keys[0])
        store.publish(works[0], PlainRecord(found="something else"), staged, "another")
    reader = opened()
    reader.keys("plain")
    assert reader.manifests(keys)[keys[0]].record == {"found": "something else"}
    store.delete(keys[0])
    reader = opened()
    reader.keys("plain")
    with pytest.raises(ArtifactError, match="is not in the store"):
        reader.manifests(keys)


@pytest.mark.parametrize("harm", ["altered", "cut", "refused"])
def test_a_pack_that_is_no_help_is_left_alone(harm, opened, proxy):
    store = opened()
    keys = [publish(store, PlainWork(number=number)) for number in range(LEAST_RECORDS)]
    if harm == "refused":
        proxy.inject("403 AccessDenied", times=9, matches=lambda asked: is_put(asked) and PACKS in asked.path)
    store.pack(keys)
    packs = [path for path in store.listing() if path.startswith(PACKS)]
    assert len(packs) == (harm != "refused")
    for path in packs:
        text = store._bucket.read_all([path])[path]
        place = f"{store.url.removeprefix('s3://')}/{path}"
        store._bucket.fs.pipe_file(place, text.replace(b"all well", b"all hell") if harm == "altered" else text[:999])
    reader = opened()
    reader.keys("plain")
    assert {manifest.record["found"] for manifest in reader.manifests(keys).values()} == {"all well"}


def cached(store):
    return {path.parents[1].relative_to(store._cache.directory).as_posix()
            for path in store._cache.directory.rglob("weights.bin")}  # fmt: skip


def test_the_cache_keeps_its_size_and_what_was_used_last(opened):
    keys = [publish(opened(), PlainWork(number=number), text="w" * 100_000) for number in range(6)]
    store = opened(cache_bytes=450_000)
    for key in keys[:4]:
        with pin_entries():
            store.fetch(key)
    with pin_entries():
        store.fetch(keys[0])
    for key in keys[4:]:
        with pin_entries():
            store.fetch(key)
    sizes = [path.stat().st_size for path in store._cache.directory.rglob("*") if path.is_file()]
    assert sum(sizes) <= 450_000
    assert cached(store) >= {keys[0], *keys[4:]}
    assert keys[1] not in cached(store)


def test_what_another_process_reads_is_not_evicted(opened):
    keys = [publish(opened(), PlainWork(number=number), text="w" * 100_000) for number in range(4)]
    store = opened(cache_bytes=150_000)
    script = (
        "import sys; from pathlib import Path; from tasks.store.store import Store\n"
        "store = Store(sys.argv[1], Path(sys.argv[2]), 150_000); store.fetch(sys.argv[3])\n"
        "print('reading', flush=True); sys.stdin.readline()"
    )
    start = [sys.executable, "-c", script, store.url, store._cache.directory, keys[0]]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"reading\n"
        for key in keys[1:]:
            with pin_entries():
                assert (store.fetch(key) / "weights.bin").stat().st_size == 100_000
        assert keys[0] in cached(store)
        reader.kill()
    with pin_entries():
        store.fetch(keys[1])
        store.fetch(keys[2])
    assert keys[0] not in cached(store)


@pytest.mark.fault("the cache's disk is full", "a tmpfs of 256 KiB: real ENOSPC")
def test_a_full_disk_of_the_cache_is_the_users_error(opened, small_disk, outcome):
    key = publish(opened(), text="w" * 1_000_000)
    store = Store(opened().url, small_disk / "cache")
    with pytest.raises(StorageError, match=f"cannot write to {small_disk}.*No space left on device"):
        store.fetch(key)
    assert not list(small_disk.rglob("*weights.bin*"))
    outcome(run="says which disk, and what to do", store="nothing half-written in the cache")


def test_the_store_module_reads_and_writes_no_pickle():
    sources = list(Path(store_module.__file__).parent.glob("*.py"))
    assert sources
    assert not [source for source in sources if "pickle" in source.read_text()]
