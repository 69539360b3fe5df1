"""Benchmarks and folders of tasks that change after a run has named them by their digests."""

import json

import pytest

from puzzle_core.benchmark_items import digest_items, read_items
from puzzle_core.errors import DataError, SpecError
from puzzle_core.spec import EvaluationSpec, HarnessSpec, MultipleChoiceSpec
from puzzle_core.work import EvaluateWork, MultipleChoiceWork
from tasks.runtime.context import RunContext
from tasks.runtime.named_inputs import digest_folder, named_task_folder, read_named_benchmarks
from tasks.stage_tasks import open_inputs

ITEM = {"query": "a", "choices": ["b", "c"], "label": 0}


def test_a_benchmark_that_changes_is_refused(tmp_path):
    file = tmp_path / "b.jsonl"
    file.write_text(json.dumps(ITEM))
    spec = EvaluationSpec(tasks=(MultipleChoiceSpec(name="b", file=str(file)),))
    items = read_items(file)
    named = MultipleChoiceWork(name="b", items=digest_items(items))
    work = EvaluateWork(parent="p", child=None, tokens="t", tasks=(named,))
    assert read_named_benchmarks(work, spec) == {"b": items}
    file.write_text(json.dumps(ITEM | {"label": 1}))
    with pytest.raises(DataError, match=f"was {digest_items(items)} when it started"):
        read_named_benchmarks(work, spec)


def test_a_folder_of_tasks_that_changes_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("task: own")
    before = digest_folder(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "own.pyc").touch()
    spec = EvaluationSpec(lm_eval_tasks=("own",), lm_eval=HarnessSpec(task_folder=str(tmp_path)))
    work = EvaluateWork(parent="p", child=None, tokens="t", lm_eval=HarnessSpec(task_folder=before))
    assert named_task_folder(work, spec) == tmp_path
    (tmp_path / "own.yaml").write_text("task: other")
    with pytest.raises(SpecError, match=f"its digest was {before}"):
        named_task_folder(work, spec)


def test_a_chat_form_is_refused_where_the_tokenizer_has_no_template(spec_of):
    spec = spec_of(evaluation={"lm_eval_tasks": ["own"], "lm_eval": {"chat_template": True}})
    with pytest.raises(SpecError, match="has no chat template"):
        open_inputs.fn(RunContext.of(spec), spec)
