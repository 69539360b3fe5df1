"""Pushing a directory to a hub that speaks Hugging Face's protocol."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from puzzle_core.credentials import has_credentials, redacted
from puzzle_core.errors import SpecError, StorageError, reason

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_target(repository: str, endpoint: str | None) -> None:
    """Check the names before any work.

    Raises:
        SpecError: the repository is not `org/name`, or the endpoint holds credentials.
    """
    if not _NAME.fullmatch(repository):
        raise SpecError(f"--hub is {repository!r}: give org/name")
    if endpoint and has_credentials(endpoint):
        raise SpecError("--endpoint holds credentials: give https://host, and set HF_TOKEN")


def push(
    repository: str, files: Mapping[str, Path | bytes], message: str, endpoint: str | None = None, private: bool = False
) -> str:
    """Push files as one commit of the branch `main`; the repository is created if it does not exist.

    Args:
        repository: `org/name`.
        files: by their path in the repository.
        message: of the commit.
        endpoint: address of the hub; that of HF_ENDPOINT, or Hugging Face's own, by default.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        StorageError: the hub does not answer, or refuses.
    """
    api = HfApi(endpoint=endpoint)
    added = [CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.create_commit(repository, added, commit_message=message).commit_url)
    except Exception as error:  # of the client, of its HTTP library and of files, which have no common base class
        raise StorageError(
            f"the hub at {redacted(api.endpoint)} did not take {repository}: {redacted(reason(error))}. Nothing was "
            "committed; check the name, the address (--endpoint or HF_ENDPOINT) and HF_TOKEN, and push again"
        ) from error
