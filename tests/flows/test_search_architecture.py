"""The search flow: it stands on scores, says when they are missing, and lists the store once and not once per score."""

import logging
import shutil
from pathlib import Path

import pytest

from flows.search_architecture import search_architecture
from puzzle_core.errors import CoverageError
from tasks.store.store import Store
from tests.workflow import artifacts, changed, of_stage


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
