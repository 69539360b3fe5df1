"""The work pool: made with its limits, and limits that somebody has changed stay."""

from pathlib import Path

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate

from flows.services.work_pool import POOL, POOL_LIMIT, QUEUES, ensure_work_pool


def test_a_pool_leaves_a_place_to_searches_and_keeps_limits_that_were_changed(prefect_server):
    with get_client(sync_client=True) as client:
        for _ in range(2):
            ensure_work_pool(prefect_server)
            queues = {name: client.read_work_queue_by_name(name, POOL) for name in QUEUES}
            limits = {name: queue.concurrency_limit for name, queue in queues.items()}
            assert client.read_work_pool(POOL).concurrency_limit == POOL_LIMIT > limits["long-runs"] + limits["layers"]
            assert limits["searches"] is None
            assert queues["searches"].priority < queues["long-runs"].priority < queues["layers"].priority
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=9))
        ensure_work_pool(prefect_server)
        assert client.read_work_pool(POOL).concurrency_limit == 9


def test_every_deployment_runs_once_at_a_time_in_a_queue_of_the_pool():
    deployments = yaml.safe_load((Path(__file__).parents[3] / "prefect.yaml").read_text())["deployments"]
    used = {entry["name"]: entry["work_pool"] for entry in deployments}
    assert {pool["name"] for pool in used.values()} == {POOL}
    assert {pool["work_queue_name"] for pool in used.values()} == QUEUES.keys()
    assert used["research-targets"]["work_queue_name"] == "searches"
    limited = {
        entry["name"]: entry["concurrency_limit"]["limit"] for entry in deployments if "concurrency_limit" in entry
    }
    assert limited == dict.fromkeys(used.keys() - {"build-layers", "add-target"}, 1)
    assert used["build-layers"]["work_queue_name"] == "layers"
