"""Where a run is tracked: the tracking URI of its specification, of the environment, or of this directory."""

import contextlib
import os
import urllib.request
from pathlib import Path

from puzzle_core.credentials import has_credentials
from puzzle_core.errors import SpecError
from puzzle_core.spec import RuntimeSpec
from tasks.runtime.private_files import DATA

VARIABLE = "MLFLOW_TRACKING_URI"
SERVED = Path(DATA) / "mlflow.url"
"""The address of the server that `make up` runs over this directory's database."""
DEFAULT = RuntimeSpec().mlflow_uri


def tracking_uri(named: str = DEFAULT) -> str:
    """The tracking URI to use.

    Args:
        named: by the specification or an option. The default means none: then the environment's MLFLOW_TRACKING_URI
            counts, then the server that `make up` runs here, then the database here.

    Raises:
        SpecError: the environment's URI holds credentials.
    """
    if named != DEFAULT:
        return named
    if chosen := os.environ.get(VARIABLE):
        if has_credentials(chosen):
            raise SpecError(
                f"{VARIABLE} holds credentials: give http://host:port, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return chosen
    return _served() or DEFAULT


def _served() -> str | None:
    """The address of the server that `make up` runs here, if it responds."""
    with contextlib.suppress(OSError, ValueError):
        address = SERVED.read_text()
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return address if answer.status == 200 else None
    return None
