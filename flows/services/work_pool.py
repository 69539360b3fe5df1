"""The work pool of the deployments, with its queues, so that no deployment keeps the runs of another waiting for ever.

Long runs (`puzzle`, `build-library`, `train-child`, `fan-out-library`) run once at a time each. They have a queue, and
so have ranges of layers, of which there are many. The limits of both are together below that of the pool: searches,
whose queue goes first, always find a place.
"""

from typing import NamedTuple

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

POOL = "puzzle"


class Queue(NamedTuple):
    """A work queue: its priority (1 goes first), and how many of its runs run at a time."""

    priority: int
    limit: int | None


QUEUES = {"searches": Queue(1, None), "long-runs": Queue(2, 4), "layers": Queue(3, 2)}
POOL_LIMIT = 1 + sum(queue.limit or 0 for queue in QUEUES.values())
"""Flow runs of the pool that run at a time."""


def ensure_work_pool(api: str) -> None:
    """Create the pool and its queues where they are missing, and set the limit of a pool that has none.

    Limits and priorities that somebody has changed stay.

    Args:
        api: the URL of the Prefect API.
    """
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        try:
            if client.read_work_pool(POOL).concurrency_limit is None:
                client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=POOL_LIMIT))
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=POOL_LIMIT))
        for name, queue in QUEUES.items():
            _ensure_queue(client, name, queue)


def _ensure_queue(client: SyncPrefectClient, name: str, queue: Queue) -> None:
    try:
        client.read_work_queue_by_name(name, POOL)
    except ObjectNotFound:
        client.create_work_queue(name, priority=queue.priority, concurrency_limit=queue.limit, work_pool_name=POOL)
