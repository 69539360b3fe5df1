"""Packs: the records of many artifacts as one object of a bucket, since a thousand small reads take seconds.

A pack is an accelerator, never a second opinion. Its name is a digest of the keys that it answers for and of the tags
that the bucket's listing has for their records at this moment: where a record is gone, new or changed, there is no pack
of that name, and records are read one by one. Packs are never changed, lie in `packs/`, belong to no artifact, and are
made again where they are missing, so `puzzle store gc` may take them.
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


class Seen(NamedTuple):
    """The text of a record, and the tag that the record had when it was last listed before it was read."""

    tag: str
    text: bytes


def packed_together(keys: Iterable[str]) -> list[list[str]]:
    """Which keys share a pack: those of one stage, where they are many."""
    stages = defaultdict(list)
    for key in keys:
        stages[key.partition("/")[0]].append(key)
    return [sorted(found) for found in stages.values() if len(found) >= LEAST_RECORDS]


def read_pack(bucket: Bucket, keys: list[str], tags: Mapping[str, str]) -> dict[str, Seen]:
    """The records of these keys, as they are listed; nothing where there is no whole pack of just these."""
    path = _path(keys, tags)
    data = bucket.read_all([path]).get(path) if path else None
    digest, _, content = (data or b"").partition(b"\n")
    if not content or hashlib.sha256(content).hexdigest().encode() != digest:
        return {}
    return {key: Seen(tags[key], text.encode()) for key, text in json.loads(content).items()}


def write_pack(bucket: Bucket, keys: list[str], tags: Mapping[str, str], seen: Mapping[str, Seen]) -> None:
    """Keep the records of these keys, if all that was read of them is as it is listed, and if the bucket lets us."""
    path = _path(keys, tags)
    if not path or any(key not in seen or seen[key].tag != tags[key] for key in keys):
        return
    content = canonical_json({key: seen[key].text.decode() for key in keys}).encode()
    with contextlib.suppress(StorageError):
        if not bucket.exists(path):
            bucket.put_new(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _path(keys: list[str], tags: Mapping[str, str]) -> str | None:
    """Where the pack of these keys lies; none where one of them is not listed, or the bucket has no tags."""
    listed = [(key, tags.get(key, "")) for key in keys]
    if not all(tag for _, tag in listed):
        return None
    name = hashlib.sha256(canonical_json(listed).encode()).hexdigest()[:40]
    return f"{PACKS}/{keys[0].partition('/')[0]}/{name}.json"
