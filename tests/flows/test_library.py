"""Building the library: what is visible, what lies in scratch, what fails by name, and that workers change nothing."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flows.build_library import build_library, score_variants, scores_at_a_time, train_variants
from flows.search_architecture import search_architecture
from flows.submit import ensure, ensure_tokens, plan_run, side_by_side
from puzzle_core import scoring
from puzzle_core.distill import bld
from puzzle_core.errors import PuzzleError
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.model.surgery import WEIGHTS
from puzzle_core.resources import resources
from puzzle_core.spec import ParentSpec
from puzzle_core.work import ScoreRecord
from tasks import stage_tasks
from tasks.runtime.context import RunContext
from tasks.stage_tasks import capture_layer, drop_activations
from tests.workflow import SCORED, TRAINED, Recorded, artifacts, changed, of_stage, plan_of


def train(spec):
    """The part of the library flow that trains, with the tokens it needs."""
    from tasks.stage_tasks import measure_importance

    plan, context = plan_of(spec)
    ensure_tokens(plan, context, "calibration", "bld")
    ensure(measure_importance, plan.importance(), context)
    side_by_side(train_variants, context)(plan, context)
    return plan, context


def test_every_variant_and_every_score_is_a_task_run_with_a_name_that_says_so(finished):
    names = finished.recorded.computed(at_least=50)
    for layer in range(5):
        for variant in ("attn:kv2", "ffn:i24"):
            assert names.count(f"bld layer {layer} {variant}") == 1
        for block in ("attn:kv2+ffn:i48", "attn:no_op+ffn:i48", "attn:kv4+ffn:i24", "attn:kv4+ffn:no_op"):
            assert names.count(f"score layer {layer} {block}") == 1
    assert len([name for name in names if name.startswith("bld ")]) == TRAINED
    assert len([name for name in names if name.startswith("capture layer ")]) == 10  # for BLD and for the scores


def test_only_what_a_missing_variant_needs_is_captured_and_trained(again, prefect_server):
    spec = again()
    plan, context = plan_of(spec)
    gone = [work for work in plan.all_bld() if (work.layer, str(work.variant)) in ((1, "attn:kv2"), (2, "ffn:i24"))]
    for work in gone:
        shutil.rmtree(Path(spec.runtime.store) / work.key)
    before, recorded = artifacts(spec.runtime.store), Recorded()
    train_variants(plan, context)
    assert changed(before, artifacts(spec.runtime.store)) == {work.key for work in gone}
    computed = [name for name in recorded.computed(at_least=5) if not name.startswith("drop")]
    assert sorted(name.split(" (")[0] for name in computed) == [
        "bld layer 1 attn:kv2",
        "bld layer 2 ffn:i24",
        "capture layer 0",
        "capture layer 1",
        "capture layer 2",
    ]


def test_at_most_three_layers_lie_in_scratch_and_none_afterwards(spec_of, prefect_server, monkeypatch):
    spec, seen = spec_of(), []
    scratch = Path(spec.runtime.scratch)

    def look():
        names = [name for _, _, names in os.walk(scratch / "activations") for name in names]
        seen.append({name for name in names if ".bin" in name})

    def looking(act):
        def looked(*arguments, **options):
            look()
            result = act(*arguments, **options)
            look()
            return result

        return looked

    monkeypatch.setattr(bld, "train_variant", looking(bld.train_variant))
    monkeypatch.setattr(Activations, "capture_layer", looking(Activations.capture_layer))
    plan, _ = train(spec)
    middles = [{name for name in names if "post-attention" in name} for names in seen]
    assert max(map(len, middles)) <= 3
    assert max(map(len, middles)) > 1
    state = spec.bld.tokens * plan.inputs.shape.hidden * 4
    assert max(map(len, seen)) * state <= resources(plan).bld_scratch_bytes
    assert {name for names in seen for name in names} >= {
        "layer-input-000.bin",
        "post-attention-004.bin",
        "layer-input-005.bin",
    }
    assert not list((scratch / "activations").rglob("*.bin*"))


def test_streamed_states_give_the_same_library_and_leave_scratch_empty(finished, again, prefect_server):
    spec = again(bld={"source": "streamed"}, runtime={"bld_side_by_side": 5})
    before = artifacts(spec.runtime.store)
    for key in of_stage(before, "bld"):
        shutil.rmtree(Path(spec.runtime.store) / key)
    recorded = Recorded()
    build_library(spec)
    after = artifacts(spec.runtime.store)
    assert after.keys() == before.keys()
    assert changed(before, after) == of_stage(before, "bld")
    for key in of_stage(after, "bld"):
        stores = spec.runtime.store, finished.content["runtime"]["store"]
        one, other = (load_file(Path(store) / key / WEIGHTS) for store in stores)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), key
    assert not list(Path(spec.runtime.scratch).rglob("*.bin"))
    names = recorded.computed(at_least=TRAINED)
    assert len([name for name in names if name.startswith("bld layer ")]) == TRAINED
    assert not [name for name in names if name.startswith("capture")]


def test_states_are_dropped_without_their_parent(spec_of, copy_of, prefect_server):
    spec = spec_of(parent={"path": str(copy_of("llama"))})
    plan, context = plan_of(spec)
    work = plan.tokens("bld")
    ensure_tokens(plan, context, "bld")
    for layer in range(2):
        capture_layer(plan.inputs.parent, work.key, "float32", layer, True, context)
    directory = context.activations(plan.inputs.parent, work.key, "float32").directory
    Path(spec.parent.path).rename(f"{spec.parent.path}-away")
    moved = RunContext(parent=ParentSpec(path=spec.parent.path), runtime=spec.runtime)
    assert moved.activations_directory(plan.inputs.parent, work.key, "float32") == directory
    drop_activations(directory, 0)
    left = {"layer-input-001.bin", "post-attention-001.bin", "layer-input-002.bin"}
    assert {file.name for file in directory.iterdir()} == left
    drop_activations(directory)
    assert not directory.exists()


def test_a_diverged_variant_fails_by_name_once_and_the_others_are_in_the_store(spec_of, prefect_server, monkeypatch):
    spec, run = spec_of(), bld.train_variant

    def reckless(work, *arguments, **options):
        if (work.layer, str(work.variant)) == (3, "ffn:i24"):
            optimizer = work.spec.optimizer.model_copy(update={"learning_rate": 1e6})
            work = work.model_copy(update={"spec": work.spec.model_copy(update={"optimizer": optimizer})})
        if work.layer == 4:
            time.sleep(1)  # it is under way when layer 3 fails
        return run(work, *arguments, **options)

    monkeypatch.setattr(bld, "train_variant", reckless)
    recorded = Recorded()
    with pytest.raises(PuzzleError, match=r"BLD of layer 3 ffn:i24 diverged: .*learning.rate"):
        train(spec)
    plan, context = plan_of(spec)
    kept = [(work.layer, str(work.variant)) for work in plan.all_bld() if context.store().has(work.key)]
    assert len(kept) == TRAINED - 1
    assert (3, "ffn:i24") not in kept
    failed = [run for run in recorded.task_runs(at_least=18) if run.state_name == "Failed" and "layer" in run.name]
    assert [(run.name, run.run_count) for run in failed] == [("bld layer 3 ffn:i24", 1)]


def test_a_learning_rate_that_is_too_high_fails_the_run_by_layer_and_variant(spec_of, prefect_server):
    spec = spec_of(bld={"optimizer": {"learning_rate": 1e6}})
    with pytest.raises(PuzzleError) as caught:
        build_library(spec)
    for variant in ("attn:kv2", "ffn:i24"):
        assert f"BLD of layer 0 {variant} diverged" in str(caught.value)
    assert not of_stage(artifacts(spec.runtime.store), "score")


def test_results_do_not_depend_on_the_workers_nor_on_what_a_process_keeps(finished, again, prefect_server, monkeypatch):
    """The second time, scores go through the layers side by side, as in a parent that does not fit into memory."""
    results = []
    for workers in (1, 2):
        if workers == 2:
            monkeypatch.setattr(Parent, "fits_cache", lambda *_: False)
            monkeypatch.setattr("flows.build_library.LAYER_CACHE_BYTES", 0)
            monkeypatch.delattr(scoring, "_cached_suffix")
        spec = again(runtime={"workers": workers})
        for key in artifacts(spec.runtime.store):
            if key.startswith(("bld/", "score/")):
                shutil.rmtree(Path(spec.runtime.store) / key)
        plan, context = plan_of(spec)
        side_by_side(train_variants, context)(plan, context)
        side_by_side(score_variants, context, scores_at_a_time(plan, context))(plan, context)
        store = context.store()
        trained = {
            (work.layer, str(work.variant), name): tensor
            for work in plan.all_bld()
            for name, tensor in load_file(store.fetch(work.key) / WEIGHTS).items()
        }
        results.append((trained, [ScoreRecord.model_validate(store.manifest(w.key).record) for w in plan.all_scores()]))
    (one, scores_of_one), (two, scores_of_two) = results
    assert one.keys() == two.keys()
    assert len(one) > TRAINED
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert scores_of_one == scores_of_two
    assert len({score.kl_nats_per_token for score in scores_of_one}) > TRAINED


def test_estimates_come_from_one_artifact_and_each_has_a_task_and_a_key(again, prefect_server):
    spec = again(scoring={"method": "fisher", "label_samples": 2})
    before, recorded = artifacts(spec.runtime.store), Recorded()
    build_library(spec)
    search_architecture(spec)
    made = changed(before, artifacts(spec.runtime.store))
    assert {stage: len(of_stage(made, stage)) for stage in ("bld", "gradients", "score", "search")} == {
        "bld": 0,
        "gradients": 1,
        "score": SCORED,
        "search": 1,
    }
    names = recorded.computed(at_least=30)
    assert names.count("gradients") == 1
    assert len([name for name in names if name.startswith("score layer")]) == SCORED
    assert "capture log-probabilities" not in names
    plan, context = plan_of(spec)
    estimates = context.store().records(ScoreRecord, [work.key for work in plan.all_scores()]).values()
    assert {score.method for score in estimates} == {"fisher"}
    exact = context.store().records(ScoreRecord, [work.key for work in plan_of(again())[0].all_scores()]).values()
    kl = {(score.layer, score.block): score.kl_nats_per_token for score in exact}
    ratios = sorted(score.kl_nats_per_token / kl[score.layer, score.block] for score in estimates)
    assert 0.5 < ratios[len(ratios) // 2] < 2

    work = plan.all_scores()[3]
    shutil.rmtree(Path(spec.runtime.store) / work.key)
    before = artifacts(spec.runtime.store)
    score_variants(plan, context)
    assert changed(before, artifacts(spec.runtime.store)) == {work.key}
    assert context.store().record(ScoreRecord, work.key) in estimates


def test_a_library_in_the_other_type_is_told_where_auto_is_another_here(again, prefect_server, monkeypatch, caplog):
    """The finished run's variants are in float32, and auto is bfloat16 on this machine."""
    monkeypatch.setattr(stage_tasks, "fast_dtype", lambda _: "bfloat16")
    warning = f"the store has {TRAINED} variants of this specification in float32"
    spec = again(bld={"dtype": "auto"})
    with caplog.at_level("INFO"):
        plan, _ = plan_run(spec)
        assert plan.spec.bld.dtype == "bfloat16"
        assert "auto is bfloat16 on this machine: bld.dtype" in caplog.text
        assert caplog.text.count(warning) == 1
        monkeypatch.setattr(stage_tasks, "fast_dtype", lambda _: "float32")
        plan, context = plan_run(spec)
        assert caplog.text.count(warning) == 1
    assert all(context.store().has(work.key) for work in plan.all_bld())
