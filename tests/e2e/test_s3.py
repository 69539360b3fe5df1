"""The whole method over a store in a bucket: what it leaves, that it is done once, and what it asks of the server."""

import pytest

from flows.puzzle import puzzle
from puzzle_core.errors import DamagedError
from tasks.runtime.context import RunContext
from tasks.store.store import MANIFEST, Store
from tests.workflow import SCORED, TRAINED, Recorded, of_stage, plan_of, publish_costs

BOOKKEEPING = {"open inputs", "check limits"}


@pytest.fixture
def spec(spec_of, bucket, proxy, prefect_server):
    """The pico run over the bucket, through the proxy, with its costs there."""
    made = spec_of(runtime={"store": bucket})
    publish_costs(made)
    return made


def test_a_run_over_s3_is_whole_and_a_second_one_on_another_machine_computes_nothing(spec, proxy, tmp_path):
    puzzle(spec)
    store = RunContext.of(spec).store()
    keys = store.keys()
    assert (len(of_stage(keys, "bld")), len(of_stage(keys, "score"))) == (TRAINED, SCORED)
    assert {key: store.damage(key) for key in keys if store.damage(key)} == {}

    elsewhere = spec.model_copy(
        update={"runtime": spec.runtime.model_copy(update={"scratch": str(tmp_path / "elsewhere")})}
    )
    proxy.requests.clear()
    recorded = Recorded()
    puzzle(elsewhere)
    assert set(recorded.computed(at_least=15)) <= BOOKKEEPING
    assert not [request.path for request in proxy.requests if request.method in ("PUT", "POST", "DELETE")]
    assert store.keys() == keys
    listings = proxy.count("GET", "list-type=2")
    assert listings <= 20
    weights = [key for key in of_stage(keys, "bld") if proxy.count("GET", f"{key}/{store.manifest(key).place}")]
    assert weights == []
    looks = [request for request in proxy.requests if request.headers.get("Range") == "bytes=0-0"]
    assert not [request.path for request in looks if "/bld/" in request.path or "/score/" in request.path]


@pytest.mark.long
@pytest.mark.fault("an object is corrupted between two runs", "other bytes of the same size put in a block's place")
def test_a_damaged_block_is_made_again_within_the_run_where_the_spec_says_so(spec, tmp_path, outcome):
    puzzle(spec)
    plan, context = plan_of(spec)
    harmed = plan.all_bld()[0]
    store = context.store()
    manifest = store.manifest(harmed.key)
    name = next(name for name in manifest.files if name.endswith(".safetensors"))
    place = f"{spec.runtime.store.removeprefix('s3://')}/{harmed.key}/{manifest.place}/{name}"
    store._bucket.fs.pipe_file(place, b"X" * manifest.files[name].size_bytes)
    users = [work.key for work in plan.all_scores() if harmed.key in (work.attention, work.ffn)]
    for number, policy in enumerate(("refuse", "recompute")):
        for key in users:
            store.delete(key)
        changes = {"scratch": str(tmp_path / f"elsewhere-{number}"), "on_corruption": policy}
        elsewhere = spec.model_copy(update={"runtime": spec.runtime.model_copy(update=changes)})
        if policy == "refuse":
            with pytest.raises(DamagedError, match=f"{harmed.key}/{name} .* delete"):
                puzzle(elsewhere)
        else:
            puzzle(elsewhere)
    fresh = Store(spec.runtime.store, tmp_path / "fresh")
    assert fresh.damage(harmed.key) == {}
    assert all(fresh.has(key) for key in users)
    assert f"{harmed.key}/{MANIFEST}" in fresh.listing()
    outcome(
        run="on_corruption: refuse names it and stops; recompute makes it again and ends right",
        store=f"the block whole again, and the scores that use it ({len(users)}) made",
    )
