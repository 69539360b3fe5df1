"""Objects of a bucket, through fsspec and s3fs: patient with a server that fails for a while, plain where it refuses.

The only file that knows fsspec. Endpoint, region and credentials come from the usual AWS environment and profiles
(`AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...); no message names more of them than the endpoint and the server's error code.
Other fsspec URLs work in the same way, as far as they offer it: `memory://` for trials, for instance.
"""

import functools
import hashlib
import http.client
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec
from botocore import exceptions as aws

from puzzle_core.errors import SpecError, StorageError

log = logging.getLogger("puzzle")
T = TypeVar("T")

PATIENCE_SECONDS = 300.0
FIRST_PATIENCE_SECONDS = 10.0
"""How long to try again where a server that answered before, were it an error, or never did, gives no good answer."""
PART_BYTES = 32 * 2**20
MOST_PARTS = 10_000
RANGE_BYTES, RANGES_AT_ONCE = 16 * 2**20, 4
LISTED_AT_ONCE = 200

_LOST = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aiohttp.ClientError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.ProfileNotFound,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.UnauthorizedSSOTokenError,
)
_WILL_PASS = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_REFUSED = {
    "ExpiredToken": "these credentials have expired: renew them",
    "TokenRefreshRequired": "these credentials have expired: renew them",
    "InvalidToken": "the session token is not valid: renew it",
    "InvalidAccessKeyId": "it does not know the access key: check AWS_PROFILE or AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: check AWS_PROFILE or AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "NoSuchBucket": "the bucket does not exist: create it, or correct runtime.store",
    "InvalidBucketName": "that is no name of a bucket: correct runtime.store",
    "PermanentRedirect": "the bucket lies in another region: set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_DEFAULT_REGION",
}


class Entry(NamedTuple):
    """One object, or one file of a local store; `tag` changes with its content."""

    size_bytes: int
    modified_s: float
    tag: str


class Bucket:
    """The objects below one URL, by their path from there."""

    def __init__(self, url: str):
        """Open the bucket; nothing is asked of it yet.

        Raises:
            SpecError: the URL's protocol is unknown, or the URL holds credentials.
        """
        place = urlsplit(url)
        if "@" in place.netloc or place.query:
            raise SpecError("runtime.store holds credentials or options: say s3://bucket/prefix, and set AWS_PROFILE")
        if place.scheme in ("file", "local"):
            raise SpecError(f"runtime.store {url!r} is a directory: say its path alone")
        s3 = {"use_listings_cache": False, "skip_instance_cache": True, "max_concurrency": RANGES_AT_ONCE}
        try:
            self.fs, root = fsspec.core.url_to_fs(url, **(s3 if place.scheme == "s3" else {}))
        except (ValueError, ImportError) as error:
            raise SpecError(f"runtime.store {url!r} is no store: {error}") from error
        self.fs.retries = 1  # botocore tries again as its settings say, and `_ask` beyond that
        self.url, self._root, self._is_s3 = url, root.rstrip("/"), place.scheme == "s3"
        self._answered = threading.Event()

    def listing(self, prefix: str = "") -> dict[str, Entry]:
        """All objects below a prefix, by path: one request per thousand."""
        try:
            found = self._ask("list", lambda: self.fs.find(f"{self._root}/{prefix}".rstrip("/"), detail=True))
        except FileNotFoundError:
            return {}
        skip = len(self._root.lstrip("/")) + 1
        return {path.lstrip("/")[skip:]: _entry(info) for path, info in found.items()}

    def exists(self, path: str) -> bool:
        """Whether there is such an object; not asked of a listing, which might be old."""
        try:
            self._ask("read", lambda: self.fs.cat_file(f"{self._root}/{path}", start=0, end=1))
        except (FileNotFoundError, EOFError):
            return False
        return True

    def size_bytes(self, path: str) -> int | None:
        """Size of one object; none where there is none."""
        try:
            return int(self._ask("read", lambda: self.fs.info(f"{self._root}/{path}"))["size"])
        except FileNotFoundError:
            return None

    def read_all(self, paths: list[str]) -> dict[str, bytes]:
        """Small objects whole, many at a time; those that do not exist are left out."""
        found: dict[str, bytes] = {}
        for start in range(0, len(paths), LISTED_AT_ONCE):
            some = paths[start : start + LISTED_AT_ONCE]
            answers = self._ask("read", functools.partial(self._read_some, [f"{self._root}/{path}" for path in some]))
            found |= {path: data for path, data in zip(some, answers, strict=True) if data is not None}
        return found

    def chunks(self, path: str, size_bytes: int) -> Iterator[bytes]:
        """The first bytes of an object, by ranges that are asked for again where a connection is lost.

        Fewer come than were asked for when the object is shorter.

        Raises:
            FileNotFoundError: there is no such object.
        """
        place, step = f"{self._root}/{path}", RANGE_BYTES * RANGES_AT_ONCE
        for first in range(0, size_bytes, step):
            starts = list(range(first, min(first + step, size_bytes), RANGE_BYTES))
            ends = [min(start + RANGE_BYTES, size_bytes) for start in starts]
            ask = functools.partial(self.fs.cat_ranges, [place] * len(starts), starts, ends, on_error="raise")
            try:
                yield from self._ask("read", ask)
            except EOFError:
                return

    def download(self, path: str, size_bytes: int, file: Path) -> str:
        """Write an object over an existing file.

        Returns:
            The hex SHA-256 of what came.

        Raises:
            FileNotFoundError: there is no such object.
        """
        digest = hashlib.sha256()
        with file.open("r+b") as out:
            for chunk in self.chunks(path, size_bytes):
                out.write(chunk)
                digest.update(chunk)
        return digest.hexdigest()

    def put(self, file: Path, path: str) -> None:
        """Store a file, in parts where it is large; nobody sees it before it is whole."""
        part = max(PART_BYTES, math.ceil(file.stat().st_size / MOST_PARTS))
        options = {"chunksize": part} if self._is_s3 else {}
        self._ask("write", lambda: self.fs.put_file(str(file), f"{self._root}/{path}", **options))

    def put_new(self, path: str, data: bytes) -> bool:
        """Store a small object unless there is one; a server that knows no conditions has the last one win.

        Returns:
            Whether it was stored.
        """
        try:
            self._ask("write", lambda: self._create(f"{self._root}/{path}", data))
        except FileExistsError:
            return False
        return True

    def remove(self, paths: Iterable[str]) -> None:
        """Remove objects, one by one in this order; those that are gone already do not matter."""
        for path in paths:
            try:
                self._ask("delete", functools.partial(self.fs.rm_file, f"{self._root}/{path}"))
            except FileNotFoundError:
                continue

    def unfinished_uploads(self) -> dict[tuple[str, str], float]:
        """Uploads in parts that never ended: when each began (epoch seconds), by path and upload id."""
        if not self._is_s3:
            return {}
        bucket, _, prefix = self._root.partition("/")
        request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        found: dict[tuple[str, str], float] = {}
        while True:
            page = self._ask("list", functools.partial(self.fs.call_s3, "list_multipart_uploads", **request))
            for upload in page.get("Uploads", []):
                path = upload["Key"].removeprefix(request["Prefix"])
                found[path, upload["UploadId"]] = upload["Initiated"].timestamp()
            if not page.get("IsTruncated"):
                return found
            request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, path: str, upload: str) -> None:
        """Drop the parts of an upload that never ended."""
        bucket, _, key = f"{self._root}/{path}".partition("/")
        abort = functools.partial(self.fs.call_s3, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        self._ask("delete", abort)

    def _read_some(self, places: list[str]) -> list[bytes | None]:
        answers = self.fs.cat_ranges(places, [0] * len(places), [None] * len(places), on_error="return")
        for answer in answers:
            if isinstance(answer, Exception) and _code(answer) != "NoSuchKey":
                raise answer
        return [answer if isinstance(answer, bytes) else None for answer in answers]

    def _create(self, place: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(place, data, mode="create")
        except OSError as error:
            if _status(error) == 412:
                raise FileExistsError(place) from error
            if _status(error) != 501:
                raise
            self.fs.pipe_file(place, data)

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Call, and again for a while where the failure may pass.

        Raises:
            StorageError: the server refuses, or gave no good answer in time.
            FileNotFoundError, FileExistsError: as the call says.
            EOFError: bytes behind the end of the object were asked for.
        """
        started, delay = time.monotonic(), 0.1
        while True:
            try:
                answer = call()
            except Exception as error:
                code = _code(error)
                if isinstance(error, FileExistsError) or code == "NoSuchKey":
                    self._answered.set()
                    raise
                if _status(error) == 416:
                    raise EOFError from error
                if not _may_pass(error):
                    refusal = self._refusal(what, error)
                    if refusal is None:
                        raise
                    raise StorageError(refusal) from error
                waited = time.monotonic() - started
                if _status(error):
                    self._answered.set()
                if waited > (PATIENCE_SECONDS if self._answered.is_set() else FIRST_PATIENCE_SECONDS):
                    raise StorageError(self._silence(error, waited)) from error
                log.log(
                    logging.WARNING if waited > FIRST_PATIENCE_SECONDS else logging.DEBUG,
                    "%s: no good answer for %.0f s (%s); trying again",
                    self.url,
                    waited,
                    code,
                )
                time.sleep(delay * random.uniform(0.5, 1))
                delay = min(2 * delay, 10.0)
            else:
                self._answered.set()
                return answer

    def _refusal(self, what: str, error: Exception) -> str | None:
        code = _code(error)
        if isinstance(error, _NO_CREDENTIALS):
            keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return f"no credentials for {self.url} ({code}): set AWS_PROFILE, or {keys}"
        if code in _REFUSED:
            return f"{self.url} at {self._endpoint()}: {_REFUSED[code]} ({code})"
        if _status(error) in (401, 403):
            return f"{self.url} at {self._endpoint()}: these credentials may not {what} there ({code}): ask its owner"
        if _status(error) or isinstance(error, aws.BotoCoreError):
            return f"{self.url} at {self._endpoint()}: cannot {what} ({code}): check runtime.store and AWS_ENDPOINT_URL"
        return None

    def _silence(self, error: Exception, waited_s: float) -> str:
        where = f"{self.url} at {self._endpoint()}"
        return f"{where}: no good answer for {waited_s:.0f} s ({_code(error)}): check AWS_ENDPOINT_URL and the network"

    def _endpoint(self) -> str:
        """Where the server is, without what may stand before an `@`."""
        client = getattr(self.fs, "_s3", None)
        place = urlsplit(client.meta.endpoint_url if client else "")
        return f"{place.scheme}://{place.netloc.rpartition('@')[2]}" if place.netloc else "an unknown endpoint"


def _entry(info: dict[str, Any]) -> Entry:
    modified = info["LastModified"].timestamp() if "LastModified" in info else info.get("created", 0.0)
    return Entry(int(info["size"]), modified, str(info.get("ETag", "")).strip('"'))


def _answer(error: BaseException) -> dict[str, Any]:
    """What the server said, as far as it said anything: botocore's response, which s3fs wraps."""
    for said in (error, error.__cause__, error.__context__):
        response = getattr(said, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _status(error: BaseException) -> int:
    """The HTTP status, or 0 where there was no answer."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: BaseException) -> str:
    """The server's error code, or the kind of error where there was no answer."""
    said = str(_answer(error).get("Error", {}).get("Code", ""))
    if isinstance(error, FileNotFoundError) and said in ("", "404"):
        return "NoSuchKey"
    return said or type(error).__name__


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status:
        return (status >= 500 and status != 501) or status in (408, 409, 429) or _code(error) in _WILL_PASS
    return isinstance(error, _LOST) and not isinstance(error, FileExistsError | FileNotFoundError)
