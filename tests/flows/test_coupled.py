"""Options whose halves train together, from the library to the child: coupled pairs, and blocks for two layers."""

import json
from pathlib import Path

import pytest

from flows.puzzle import puzzle
from flows.refine_search import find_answer
from flows.search_architecture import answering_plan
from puzzle_core.architecture import EMPTY_BLOCK, Option
from puzzle_core.report.library_index import StoredArtifact, library_index, library_keys
from puzzle_core.search.search_record import SearchRecord
from tests.workflow import Recorded, artifacts, changed, of_stage, plan_of, publish_costs

KEPT = {"first_layer": 2, "last_layer": 4, "ffn_ratios": [], "no_op": False}  # so that few pairs are trained
SPACE = {"kv_heads": [], "spans": [2], "span_blocks": ["attn:kv4+ffn:i48"], "layers": [KEPT]}


@pytest.mark.long
def test_the_pairs_that_a_first_search_picks_are_trained_and_reach_the_child(again, prefect_server):
    spec = again(
        variants=SPACE,
        bld={"coupled": "shortlist"},
        scenario={"limits": {"parameters": None, "kv_heads": "60%"}},  # so that attentions must go
        search={"baselines": ["depth"]},
    )
    publish_costs(spec)
    before = artifacts(spec.runtime.store)
    puzzle(spec)
    first, context = plan_of(spec)
    plan, store = answering_plan(first, context), context.store()
    made = changed(before, artifacts(spec.runtime.store))
    whole = {work.key: work for work in plan.all_bld() if isinstance(work.variant, Option)}
    assert of_stage(made, "bld") == whole.keys()
    assert {(work.layer, work.last_layer) for work in whole.values() if work.last_layer > work.layer} == {
        (layer, layer + 1) for layer in range(4)
    }
    spaces = [plan.variants.of_layer(layer, plan.inputs.shape) for layer in range(5)]
    assert all(len(attentions) <= 4 and len(ffns) <= 3 for attentions, ffns in spaces)
    assert sum(len(attentions) * len(ffns) - 1 for attentions, ffns in spaces) >= len(whole) - 4 > 0

    (dropping,) = store.record(SearchRecord, first.search().key).baselines
    assert [layer for layer, block in enumerate(dropping.architecture.layers) if block == EMPTY_BLOCK] == [0, 1]

    chosen = find_answer(plan, context).best.architecture
    changed_options = {str(option) for layer, option in chosen.options.items() if plan.library_key(layer, option)}
    assert changed_options
    assert {name for layer in plan.assemble(chosen).library for name, _ in layer} == changed_options
    config = json.loads((store.fetch(plan.gkd(chosen).key) / "config.json").read_text())
    assert len(config["block_configs"]) == config["num_hidden_layers"] == len(chosen.options)

    manifests = store.manifests(library_keys(plan))
    stored = {key: StoredArtifact(manifest.record, manifest.size_bytes) for key, manifest in manifests.items()}
    index = library_index(plan, stored)
    assert {variant.key for layer in index.layers for variant in layer.variants} == {w.key for w in plan.all_bld()}
    assert [score.span for score in index.layers[0].scores].count(2) == 1

    before, recorded = artifacts(spec.runtime.store), Recorded()
    puzzle(spec)
    assert changed(before, artifacts(spec.runtime.store)) == set()
    assert not [name for name in recorded.computed(at_least=1) if name.startswith(("bld", "score"))]
    assert not list(Path(spec.runtime.scratch).rglob("*.bin"))
