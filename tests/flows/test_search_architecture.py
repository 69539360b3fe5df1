"""The search flow: it stands on scores, says when they are missing, and lists the store once and not once per score."""

import shutil
from pathlib import Path

import pytest

from flows.search_architecture import search_architecture
from puzzle_core.errors import CoverageError
from tasks.store import Store
from tests.workflow import artifacts, of_stage


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
