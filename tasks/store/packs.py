"""Packs: the records of many artifacts as one object of a bucket, since a thousand small reads take seconds.

A pack only saves reads; the records themselves stay the truth. The name of a pack is a digest of its keys and of the
tags that the bucket's listing shows for their records now. After a record is removed, added or changed no pack has
that name, and records are read one by one. A pack never changes. It lies in `packs/`, belongs to no artifact, and is
written again where it is missing, so `puzzle store gc` may remove it.
"""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from puzzle_core.errors import StorageError
from puzzle_core.records import canonical_json
from tasks.store.bucket import Bucket

PACKS = "packs"
LEAST_RECORDS = 50


class RecordText(NamedTuple):
    """The text of a record, and the record's tag in the last listing before it was read."""

    tag: str
    text: bytes


def pack_groups(keys: Iterable[str]) -> list[list[str]]:
    """The keys that share a pack: by stage, where a stage has at least LEAST_RECORDS of them."""
    stages = defaultdict(list)
    for key in keys:
        stages[key.partition("/")[0]].append(key)
    return [sorted(group) for group in stages.values() if len(group) >= LEAST_RECORDS]


def read_pack(bucket: Bucket, keys: list[str], tags: Mapping[str, str]) -> dict[str, RecordText]:
    """The records of these keys from their pack; empty where there is no intact pack of exactly these records.

    Args:
        bucket: where packs lie.
        keys: of one stage.
        tags: of records, by key, as listed.
    """
    path = _path(keys, tags)
    data = bucket.read_all([path]).get(path) if path else None
    digest, _, content = (data or b"").partition(b"\n")
    if not content or hashlib.sha256(content).hexdigest().encode() != digest:
        return {}
    return {key: RecordText(tags[key], text.encode()) for key, text in json.loads(content).items()}


def write_pack(bucket: Bucket, keys: list[str], tags: Mapping[str, str], texts: Mapping[str, RecordText]) -> None:
    """Write the pack of these keys, unless a text was read under another tag than listed, or the bucket refuses."""
    path = _path(keys, tags)
    if not path or any(key not in texts or texts[key].tag != tags[key] for key in keys):
        return
    content = canonical_json({key: texts[key].text.decode() for key in keys}).encode()
    with contextlib.suppress(StorageError):
        if not bucket.exists(path):
            bucket.put_new(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _path(keys: list[str], tags: Mapping[str, str]) -> str | None:
    """Path of the pack of these keys; none where one of them is not listed, or the bucket has no tags."""
    listed = [(key, tags.get(key, "")) for key in keys]
    if not all(tag for _, tag in listed):
        return None
    name = hashlib.sha256(canonical_json(listed).encode()).hexdigest()[:40]
    return f"{PACKS}/{keys[0].partition('/')[0]}/{name}.json"
