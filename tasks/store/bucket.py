"""Objects of a bucket, through fsspec and s3fs. Errors that may pass are retried, refusals are raised at once.

The only file that imports fsspec. Endpoint, region and credentials come from the usual AWS environment and profiles
(`AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...). Of these, messages show only the endpoint and the server's error code. Other
fsspec URLs, such as `memory://` for trials, work in the same way as far as their file system supports it.
"""

import functools
import hashlib
import http.client
import logging
import math
import os
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

RETRY_SECONDS_AFTER_ANSWER = 300.0
RETRY_SECONDS_NEVER_ANSWERED = 10.0
"""Seconds to keep retrying: the former if the server has responded before (also with an error), else the latter."""
PART_BYTES = 32 * 2**20
MOST_PARTS = 10_000
RANGE_BYTES, RANGES_AT_ONCE = 16 * 2**20, 4
READS_AT_ONCE = 200

_CONNECTION_ERRORS = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aiohttp.ClientError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)
_CREDENTIAL_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.ProfileNotFound,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.UnauthorizedSSOTokenError,
)
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_REFUSAL_ADVICE = {
    "ExpiredToken": "these credentials have expired: renew them",
    "TokenRefreshRequired": "these credentials have expired: renew them",
    "InvalidToken": "the session token is not valid: renew it",
    "InvalidAccessKeyId": "it does not know the access key: check AWS_PROFILE or AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: check AWS_PROFILE or AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "NoSuchBucket": "the bucket does not exist: create it, or correct runtime.store",
    "InvalidBucketName": "that is not a valid bucket name: correct runtime.store",
    "PermanentRedirect": "the bucket lies in another region: set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_DEFAULT_REGION",
}


class FileStatus(NamedTuple):
    """One object, or one file of a local store; `tag` changes with its content."""

    size_bytes: int
    modified_s: float
    tag: str


class Bucket:
    """The objects below one URL, by their path relative to it."""

    def __init__(self, url: str):
        """Open the bucket; sends no request yet.

        Raises:
            SpecError: the URL's protocol is unknown, or the URL holds credentials.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise SpecError("runtime.store holds credentials or options: give s3://bucket/prefix, and set AWS_PROFILE")
        if parts.scheme in ("file", "local"):
            raise SpecError(f"runtime.store {url!r} is a directory: give its path alone")
        s3 = {
            "use_listings_cache": False,
            "skip_instance_cache": True,
            "max_concurrency": RANGES_AT_ONCE,
            "config_kwargs": _checksum_settings(),
        }
        try:
            self.fs, root = fsspec.core.url_to_fs(url, **(s3 if parts.scheme == "s3" else {}))
        except (ValueError, ImportError) as error:
            raise SpecError(f"runtime.store {url!r} is no store: {error}") from error
        self.fs.retries = 1  # botocore retries by its own settings, `_request` beyond them
        self.url, self._root, self._is_s3 = url, root.rstrip("/"), parts.scheme == "s3"
        self._answered = threading.Event()

    def listing(self, prefix: str = "") -> dict[str, FileStatus]:
        """All objects below a prefix, by path: one request per thousand."""
        try:
            objects = self._request("list", lambda: self.fs.find(f"{self._root}/{prefix}".rstrip("/"), detail=True))
        except FileNotFoundError:
            return {}
        skip = len(self._root.lstrip("/")) + 1
        return {path.lstrip("/")[skip:]: _entry(info) for path, info in objects.items()}

    def exists(self, path: str) -> bool:
        """Whether the object exists; asks for the object itself, since a listing might be old."""
        try:
            self._request("read", lambda: self.fs.cat_file(f"{self._root}/{path}", start=0, end=1))
        except (FileNotFoundError, EOFError):
            return False
        return True

    def size_bytes(self, path: str) -> int | None:
        """Size of an object; none where it does not exist."""
        try:
            return int(self._request("read", lambda: self.fs.info(f"{self._root}/{path}"))["size"])
        except FileNotFoundError:
            return None

    def read_all(self, paths: list[str]) -> dict[str, bytes]:
        """The contents of small objects, by path; those that do not exist are left out. Reads many at a time."""
        contents: dict[str, bytes] = {}
        for start in range(0, len(paths), READS_AT_ONCE):
            batch = paths[start : start + READS_AT_ONCE]
            answers = self._request(
                "read", functools.partial(self._read_batch, [f"{self._root}/{path}" for path in batch])
            )
            contents |= {path: data for path, data in zip(batch, answers, strict=True) if data is not None}
        return contents

    def chunks(self, path: str, size_bytes: int) -> Iterator[bytes]:
        """The first `size_bytes` bytes of an object, or all of a shorter one.

        Reads ranges, and retries a range when its connection is lost.

        Raises:
            FileNotFoundError: there is no such object.
        """
        location, step = f"{self._root}/{path}", RANGE_BYTES * RANGES_AT_ONCE
        for first in range(0, size_bytes, step):
            starts = list(range(first, min(first + step, size_bytes), RANGE_BYTES))
            ends = [min(start + RANGE_BYTES, size_bytes) for start in starts]
            call = functools.partial(self.fs.cat_ranges, [location] * len(starts), starts, ends, on_error="raise")
            try:
                yield from self._request("read", call)
            except EOFError:
                return

    def download(self, path: str, size_bytes: int, file: Path) -> str:
        """Write the content of an object into an existing file.

        Returns:
            The hex SHA-256 of the bytes received.

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
        """Upload a file, in parts where it is large. The object appears only when it is complete."""
        part = max(PART_BYTES, math.ceil(file.stat().st_size / MOST_PARTS))
        options = {"chunksize": part} if self._is_s3 else {}
        self._request("write", lambda: self.fs.put_file(str(file), f"{self._root}/{path}", **options))

    def write(self, path: str, data: bytes) -> None:
        """Write a small object, over one that exists."""
        self._request("write", lambda: self.fs.pipe_file(f"{self._root}/{path}", data))

    def put_new(self, path: str, data: bytes) -> bool:
        """Write a small object unless it exists. On a server without conditional writes the last writer wins.

        Returns:
            Whether it was written.
        """
        try:
            self._request("write", lambda: self._create(f"{self._root}/{path}", data))
        except FileExistsError:
            return False
        return True

    def remove(self, paths: Iterable[str]) -> None:
        """Remove objects, one by one in this order; objects that do not exist are skipped."""
        for path in paths:
            try:
                self._request("delete", functools.partial(self.fs.rm_file, f"{self._root}/{path}"))
            except FileNotFoundError:
                continue

    def unfinished_uploads(self) -> dict[tuple[str, str], float]:
        """Unfinished multipart uploads: start time (epoch seconds) by path and upload id."""
        if not self._is_s3:
            return {}
        bucket, _, prefix = self._root.partition("/")
        request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        started_s: dict[tuple[str, str], float] = {}
        while True:
            page = self._request("list", functools.partial(self.fs.call_s3, "list_multipart_uploads", **request))
            for upload in page.get("Uploads", []):
                path = upload["Key"].removeprefix(request["Prefix"])
                started_s[path, upload["UploadId"]] = upload["Initiated"].timestamp()
            if not page.get("IsTruncated"):
                return started_s
            request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, path: str, upload: str) -> None:
        """Abort an unfinished multipart upload, which removes its parts."""
        bucket, _, key = f"{self._root}/{path}".partition("/")
        abort = functools.partial(self.fs.call_s3, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        self._request("delete", abort)

    def _read_batch(self, locations: list[str]) -> list[bytes | None]:
        answers = self.fs.cat_ranges(locations, [0] * len(locations), [None] * len(locations), on_error="return")
        for answer in answers:
            if isinstance(answer, Exception) and _code(answer) != "NoSuchKey":
                raise answer
        return [answer if isinstance(answer, bytes) else None for answer in answers]

    def _create(self, location: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(location, data, mode="create")
        except OSError as error:
            if _status(error) == 412:
                raise FileExistsError(location) from error
            if _status(error) != 501:
                raise
            self.fs.pipe_file(location, data)

    def _request(self, what: str, call: Callable[[], T]) -> T:
        """Call, and retry errors that may pass.

        Args:
            what: the operation, as error texts name it: "read", "write", ...
            call: sends the request.

        Raises:
            StorageError: the server refuses, or gives no good answer in time.
            FileNotFoundError, FileExistsError: raised by the call.
            EOFError: the range begins behind the end of the object.
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
                if not _is_transient(error):
                    refusal = self._refusal(what, error)
                    if refusal is None:
                        raise
                    raise StorageError(refusal) from error
                waited = time.monotonic() - started
                if _status(error):
                    self._answered.set()
                if waited > (RETRY_SECONDS_AFTER_ANSWER if self._answered.is_set() else RETRY_SECONDS_NEVER_ANSWERED):
                    raise StorageError(self._no_answer(error, waited)) from error
                log.log(
                    logging.WARNING if waited > RETRY_SECONDS_NEVER_ANSWERED else logging.DEBUG,
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
        """The message of an error that no retry mends; none for an error that neither server nor botocore raised."""
        code = _code(error)
        if isinstance(error, _CREDENTIAL_ERRORS):
            keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return f"no credentials for {self.url} ({code}): set AWS_PROFILE, or {keys}"
        if code in _REFUSAL_ADVICE:
            return f"{self.url} at {self._endpoint()}: {_REFUSAL_ADVICE[code]} ({code})"
        if _status(error) in (401, 403):
            return f"{self.url} at {self._endpoint()}: these credentials may not {what} there ({code}): ask its owner"
        if _status(error) or isinstance(error, aws.BotoCoreError):
            advice = "check runtime.store and AWS_ENDPOINT_URL"
            if "checksum" in str(_response(error).get("Error", {}).get("Message", "")).lower():
                advice = "it refuses the checksums of the request: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
            return f"{self.url} at {self._endpoint()}: cannot {what} ({code}): {advice}"
        return None

    def _no_answer(self, error: Exception, waited_s: float) -> str:
        store = f"{self.url} at {self._endpoint()}"
        return f"{store}: no good answer for {waited_s:.0f} s ({_code(error)}): check AWS_ENDPOINT_URL and the network"

    def _endpoint(self) -> str:
        """The address of the server, without a user and password."""
        client = getattr(self.fs, "_s3", None)
        parts = urlsplit(client.meta.endpoint_url if client else "")
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "an unknown endpoint"


# `Any`: fsspec and botocore have no types for the dictionaries that they return.
def _entry(info: dict[str, Any]) -> FileStatus:
    modified = info["LastModified"].timestamp() if "LastModified" in info else info.get("created", 0.0)
    return FileStatus(int(info["size"]), modified, str(info.get("ETag", "")).strip('"'))


def _response(error: BaseException) -> dict[str, Any]:
    """Botocore's response, which s3fs wraps; empty where the server did not respond."""
    for source in (error, error.__cause__, error.__context__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _status(error: BaseException) -> int:
    """The HTTP status, or 0 where there was no response."""
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: BaseException) -> str:
    """The server's error code, or the name of the exception where there was no response."""
    code = str(_response(error).get("Error", {}).get("Code", ""))
    if isinstance(error, FileNotFoundError) and code in ("", "404"):
        return "NoSuchKey"
    return code or type(error).__name__


def _checksum_settings() -> dict[str, str]:
    """Botocore's settings of checksums: only where S3 requires them, unless the environment says otherwise.

    Other servers refuse the headers of botocore's default. The store has digests of its own.
    """
    settings = ("request_checksum_calculation", "response_checksum_validation")
    return {name: "when_required" for name in settings if f"AWS_{name.upper()}" not in os.environ}


def _is_transient(error: Exception) -> bool:
    """Whether a retry may succeed."""
    status = _status(error)
    if status:
        return (status >= 500 and status != 501) or status in (408, 409, 429) or _code(error) in _TRANSIENT_CODES
    return isinstance(error, _CONNECTION_ERRORS) and not isinstance(error, FileExistsError | FileNotFoundError)
