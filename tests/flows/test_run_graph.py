"""The graph of a run as Prefect's server has it: edges between tasks and between flows, and what a warm run shows."""

import json
from urllib.request import urlopen

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

from flows import submit
from flows.build_library import train_variants
from flows.puzzle import puzzle
from tests.workflow import SCORED, TRAINED, Recorded, artifacts, edges, plan_of

FLOWS = ("build-library", "search-architecture", "train-child")


def drawn(url, recorded, flow):
    """The graph that the UI draws of a flow's run: the labels of every node's sources, by its label."""
    (flow_run,) = {run.flow_run_id for run in recorded.task_runs() if run.name.startswith(flow)}
    with urlopen(f"{url}/flow_runs/{flow_run}/graph-v2") as answer:
        nodes = dict(json.load(answer)["nodes"])
    label = {key: node["label"].split(" / ")[0] for key, node in nodes.items()}
    return {label[key]: {label[parent["id"]] for parent in node["parents"]} for key, node in nodes.items()}


def check_works(found):
    """Edges that follow from the keys that works name, in a run that computes and in one that finds everything."""
    variant, block = "bld layer 3 ffn:i24", "score layer 3 attn:kv4+ffn:i24"
    assert found["tokens bld"] == {"open inputs"}
    assert found[variant] >= {"tokens bld", "importance"}
    assert found["bld layer 3 attn:kv2"] >= {"tokens bld"}
    assert {name for name in found[block] if name.startswith(("bld", "tokens"))} == {variant, "tokens scoring"}
    (search,) = (name for name in found if name.startswith("search "))
    assert len([name for name in found[search] if name.startswith("score layer")]) == SCORED
    assert {name for name in found[search] if not name.startswith("score layer")} == {"cost this-machine batch 1"}
    assembled = found["assemble child after assembly"]
    assert search in assembled
    assert all(name.startswith("bld layer ") for name in assembled - {search})
    assert found["gkd"] == {"assemble child after assembly", "tokens gkd"}
    assert found["evaluate child after GKD"] >= {"gkd", "tokens evaluation"}


def test_a_run_that_computes_has_the_edges_of_its_data(finished, prefect_server):
    found = edges(finished.recorded.task_runs())
    check_works(found)
    states = "capture layer 3"
    assert {name.split(" (")[0] for name in found["bld layer 3 ffn:i24"]} == {states, "tokens bld", "importance"}
    assert states in {name.split(" (")[0] for name in found["score layer 3 attn:kv4+ffn:i24"]}
    whole = drawn(prefect_server, finished.recorded, "build-library")
    assert whole["build-library"] == {f"tokens {split}" for split in ("calibration", "bld", "scoring")}
    assert "build-library" in whole["search-architecture"]
    assert {"search-architecture", "tokens gkd"} <= whole["train-child"]
    assert set(FLOWS) <= whole["report"]
    library = drawn(prefect_server, finished.recorded, "train-variants")
    assert {"train-variants", "tokens scoring"} == library["score-variants"]
    assert {"importance", "tokens bld"} == library["train-variants"]


def test_more_than_the_limit_are_listed_in_one_table(again, prefect_server, monkeypatch):
    spec = again(name="listed")
    plan, context = plan_of(spec)
    monkeypatch.setattr(submit, "MOST_CACHED", TRAINED - 1)
    train_variants(plan, context)
    with get_client(sync_client=True) as client:
        (table,) = client.read_latest_artifacts(
            artifact_filter=ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=["found-bld-listed"]))
        )
    assert {row["key"] for row in json.loads(table.data)} == {work.key for work in plan.all_bld()}


def test_a_second_run_computes_nothing_and_shows_its_tasks_as_cached_with_the_same_edges(again):
    spec, recorded = again(), Recorded()
    before = artifacts(spec.runtime.store)
    puzzle(spec)
    assert artifacts(spec.runtime.store) == before
    runs = recorded.task_runs(at_least=TRAINED + SCORED + 20)
    cached = [run.name for run in runs if run.state_name == "Cached"]
    assert len([name for name in cached if name.startswith("bld layer ")]) == TRAINED
    assert len([name for name in cached if name.startswith("score layer ")]) == SCORED
    assert {"importance", "tokens bld", "gkd", "evaluate parent", "timing", "report"} <= set(cached)
    assert sorted(recorded.computed()) == ["check limits", "check limits", "open inputs"]
    check_works(edges(runs))
