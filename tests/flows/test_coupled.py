"""Options whose halves are trained together, from the library to the child: coupled blocks, and those that span layers."""

import json
from pathlib import Path

from flows.puzzle import puzzle
from flows.refine_search import find_answer
from puzzle_core.report.library_index import StoredArtifact, library_index, library_keys
from tests.workflow import Recorded, artifacts, changed, plan_of, publish_costs

SPACE = {"kv_heads": [], "spans": [2], "span_blocks": ["attn:kv4+ffn:i48"]}


def test_coupled_blocks_and_spans_reach_the_child(again, prefect_server):
    spec = again(
        variants=SPACE,
        bld={"coupled": "linear_and_no_op"},
        scoring={"composition": "pairs"},
        scenario={"limits": {"parameters": "60%"}},
        search={"baselines": []},
    )
    publish_costs(spec)
    before = artifacts(spec.runtime.store)
    puzzle(spec)
    plan, context = plan_of(spec)
    made, store = changed(before, artifacts(spec.runtime.store)), context.store()
    coupled = {"attn:kv4+ffn:no_op", "attn:no_op+ffn:i24", "attn:no_op+ffn:i48"}
    trained = [(work.layer, str(work.variant)) for work in plan.all_bld() if work.key in made]
    expected = {(layer, block) for layer in range(5) for block in coupled}
    assert {*trained} == expected | {(layer, "attn:kv4+ffn:i48 x2") for layer in range(4)}

    chosen = find_answer(plan, context).best.architecture
    assembling = plan.assemble(chosen)
    whole = {str(option) for layer, option in chosen.options.items() if plan.library_key(layer, option)}
    assert whole
    assert whole == {name for layer in assembling.library for name, _ in layer if "+" in name}
    config = json.loads((store.fetch(plan.gkd(chosen).key) / "config.json").read_text())
    assert len(config["block_configs"]) == config["num_hidden_layers"] == len(chosen.options)

    manifests = store.manifests(library_keys(plan))
    stored = {key: StoredArtifact(manifest.record, manifest.size_bytes) for key, manifest in manifests.items()}
    first = library_index(plan, stored).layers[0]
    assert {str(variant.variant) for variant in first.variants} == {"ffn:i24", *coupled, "attn:kv4+ffn:i48 x2"}
    assert [(str(score.attention), str(score.ffn)) for score in first.scores if score.span == 2] == [
        ("attn:kv4", "ffn:i48")
    ]

    before, recorded = artifacts(spec.runtime.store), Recorded()
    puzzle(spec)
    assert changed(before, artifacts(spec.runtime.store)) == set()
    assert not [name for name in recorded.computed(at_least=1) if name.startswith(("bld", "score"))]
    assert not list(Path(spec.runtime.scratch).rglob("*.bin"))
