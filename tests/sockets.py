"""What processes listen on."""

from collections.abc import Iterable
from typing import Any

import psutil


def listening(processes: Iterable[psutil.Process]) -> set[Any]:
    """Addresses (`ip`, `port`) on which these processes accept connections."""
    connections = [connection for process in processes for connection in process.net_connections("inet")]
    return {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
