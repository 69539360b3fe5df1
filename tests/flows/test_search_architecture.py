"""The search flow: it stands on scores, says when they are missing, and lists the store once and not once per score."""

import logging
import shutil
from pathlib import Path

import pytest

from flows.build_library import build_library
from flows.puzzle import puzzle
from flows.search_architecture import search_architecture
from puzzle_core.architecture import Architecture
from puzzle_core.errors import CoverageError
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.search.lazy import not_exact
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.work import ScoreRecord
from tasks.store.store import Store
from tests.workflow import SCORED, artifacts, changed, of_stage, plan_of, publish_costs


def test_missing_scores_are_counted_and_named_with_what_to_do(again):
    spec = again(scenario={"name": "other"})
    gone = sorted(of_stage(artifacts(spec.runtime.store), "score"))[:3]
    for key in gone:
        shutil.rmtree(Path(spec.runtime.store) / key)
    with pytest.raises(CoverageError, match=r"3 scores are not in the store .* layer \d .*run `puzzle build-library`"):
        search_architecture(spec)


def test_the_store_is_listed_a_few_times_however_many_scores_there_are(again, monkeypatch):
    spec, asked, keys = again(scenario={"name": "other"}), [], Store.keys
    monkeypatch.setattr(Store, "keys", lambda store, stage: asked.append(stage) or keys(store, stage))
    search_architecture(spec)
    assert asked.count("score") <= 2


def test_where_mlflow_cannot_be_reached_the_answer_is_in_the_store_all_the_same(again, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    spec = again(scenario={"name": "untracked"}, runtime={"mlflow_uri": "http://127.0.0.1:9"})
    before = artifacts(spec.runtime.store)
    with caplog.at_level(logging.WARNING, "puzzle"):
        search_architecture(spec)
    assert len(of_stage(changed(before, artifacts(spec.runtime.store)), "search")) == 1
    assert caplog.text.count("MLflow at http://127.0.0.1:9 cannot be reached, the run goes on without it") == 1


def test_a_lazy_search_scores_exactly_what_its_answer_uses_and_the_next_one_only_what_is_new(again):
    def search(share):
        spec = again(
            scoring={"method": "lazy", "label_samples": 2},
            scenario={"name": f"at-{share}", "limits": {"parameters": f"{share}%"}},
        )
        before = artifacts(spec.runtime.store)
        search_architecture(spec)
        plan, context = plan_of(spec)
        record = context.store().record(SearchRecord, plan.search().key)
        scored = context.store().records(ScoreRecord, record.exact_scores).values()
        assert {score.method for score in scored} == {"exact"}
        exact = {(score.layer, score.option) for score in scored}
        assert not not_exact(record.solutions, "subblocks", Architecture.of_parent(plan.inputs.shape), exact)
        assert not not_exact(record.frontier, "subblocks", Architecture.of_parent(plan.inputs.shape), exact)
        return record, of_stage(changed(before, artifacts(spec.runtime.store)), "score")

    build_library(again(scoring={"method": "lazy", "label_samples": 2}))
    spec = again()
    for key in plan_of(spec)[0].search().scores:  # exact scores of a run before
        shutil.rmtree(Path(spec.runtime.store) / key)
    first, scored = search(90)
    assert set(first.exact_scores) == scored
    assert 0 < len(scored) <= SCORED
    second, more = search(80)
    assert more == set(second.exact_scores) - scored
    assert set(second.exact_scores) & scored
    assert not list(Path(spec.runtime.scratch).rglob("*.bin"))

    again_first, none = search(90)
    assert again_first == first
    assert none == set()


def test_the_answer_of_a_lazy_run_does_not_depend_on_the_scores_that_are_there_and_its_report_has_them(again):
    spec = again(scoring={"method": "lazy", "label_samples": 2})
    report = puzzle(spec)  # the store has all exact scores, of the finished run
    plan, context = plan_of(spec)
    first = context.store().record(SearchRecord, plan.search().key)
    inputs = ReportInputs.read(Path(spec.runtime.store) / report / "report.json")
    methods = {(score.layer, score.option): score.method for score in inputs.scores}
    used = not_exact(first.solutions, "subblocks", Architecture.of_parent(inputs.shape), ())
    assert {methods[place] for place in used} == {"exact"}
    assert "fisher" in methods.values()
    for key in (plan.search().key, *plan.search().exact):
        shutil.rmtree(Path(spec.runtime.store) / key)
    search_architecture(spec)
    second = context.store().record(SearchRecord, plan.search().key)
    assert (second.exact_scores, second.best.architecture) == (first.exact_scores, first.best.architecture)
    assert second.best.score == first.best.score


def test_a_window_is_scored_on_longer_windows_too_and_the_search_adds_both_up(again):
    """A window in one layer, which the first scores read as the full attention and the long ones do not."""
    without = [{"first_layer": first, "last_layer": last, "ids": []} for first, last in ((0, 0), (2, 4))]
    window = {"ids": ["attn:kv4:w20"], "layers": without}
    long = {"tokens": 256, "sequence_length": 64, "weight": 0.5}
    spec = again(variants=window, scoring={"long": long})
    publish_costs(spec)
    before = artifacts(spec.runtime.store)
    build_library(spec)
    search_architecture(spec)
    plan, context = plan_of(spec)
    after, store = changed(before, artifacts(spec.runtime.store)), context.store()
    new = [work for work in plan.all_scores() if str(work.block.attention) == "attn:kv4:w20"]
    assert of_stage(after, "score") == {work.key for work in (*new, *plan.long_scores())}
    assert len(plan.long_scores()) == len(plan.all_scores()) == SCORED + 1
    scores = {split: {} for split in plan.scoring_splits}
    for split, found in scores.items():
        for record in store.records(ScoreRecord, [work.key for work in plan.all_scores(split=split)]).values():
            found[record.layer, record.block] = record.kl_nats_per_token
            assert record.tokens == plan.splits[split].tokens
    best, own = store.record(SearchRecord, plan.search().key).best, plan.inputs.shape.parent_block(0)
    used = [(n, own.with_variant(v)) for n, b in enumerate(best.architecture.layers) for v in b.subblocks]
    first, long = (sum(found.get(place, 0.0) for place in used) for found in scores.values())
    assert best.score == pytest.approx(first + 0.5 * long)
    assert not list(Path(spec.runtime.scratch).rglob("*.bin"))
