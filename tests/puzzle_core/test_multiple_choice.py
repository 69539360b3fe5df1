"""Multiple choice: the answers of plain loops, whatever shares a forward pass, and those of lm-evaluation-harness."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core import evaluation, multiple_choice
from puzzle_core.benchmark_items import Item
from puzzle_core.errors import DataError, NonFiniteError
from puzzle_core.model import layered, predictions
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.layered import layered_child, layered_parent
from puzzle_core.multiple_choice import answer_items, encode_items, encode_pair
from puzzle_core.spec import HarnessSpec
from puzzle_core.work import EvaluateWork, MultipleChoiceWork
from tests.conftest import CPU, MIXED
from tests.pico import edit_tensors
from tests.reference.choices import answers, log_likelihood

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "(quietly)", "waits", "for", "one"]


def question(number: int) -> Item:
    """An item with choices of different lengths, every third one with two contexts."""
    words = WORDS[number % 7 :] + WORDS[: number % 7]
    if number % 3 == 2:
        return Item(
            contexts=("it " + words[0], "it is " + words[1]), continuation=" ".join(words[2:5]), label=number % 2
        )
    choices = tuple(" ".join(words[k : k + 1 + k % 3]) for k in range(2 + number % 3))
    return Item(query=" ".join(words[: 1 + number % 5]) + "?", choices=choices, label=number % len(choices))


ITEMS = [question(number) for number in range(24)]


@pytest.fixture
def tokenizer(parent):
    return parent.tokenizer()


def expected(model, tokenizer, items):
    """Right answers, by likelihood and by likelihood per character."""
    plain, by_length = [], []
    for item in items:
        found = [log_likelihood(model, *encode_pair(tokenizer, *option)) for option in item.options()]
        plain.append(answers(found) == item.label)
        lengths = [len(continuation) for _, continuation in item.options()]
        by_length.append(answers([value / length for value, length in zip(found, lengths, strict=True)]) == item.label)
    return plain, by_length


def test_a_parent_has_the_answers_of_plain_loops(parent, tokenizer, checkpoint_of):
    result = answer_items(layered_parent(parent, torch.float32, CPU), encode_items(tokenizer, "b", ITEMS, 128))
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"))
    plain, by_length = expected(model, tokenizer, ITEMS)
    share = sum(plain) / len(ITEMS)
    assert 0 < share < 1
    assert plain != by_length
    assert result.accuracy == pytest.approx(share)
    assert result.accuracy_by_length == pytest.approx(sum(by_length) / len(ITEMS))
    assert result.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (len(ITEMS) - 1)))


@pytest.mark.parametrize("name", ["llama", "smollm3", "rope-yarn", "qwen3", "tied", "mistral-window", "gemma2"])
def test_likelihoods_are_those_of_one_choice_at_a_time(name, parent_of, checkpoint_of):
    """A choice that saw its neighbour, or stood at another position, would have another likelihood."""
    parent = parent_of(name)
    tokenizer, model = parent.tokenizer(), layered_parent(parent, torch.float32, CPU)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint_of(name))
    groups = [
        group
        for number, item in enumerate(ITEMS)
        for group in multiple_choice._groups(tokenizer, "b", number, item, 128)
    ]
    assert any(len(group.continuations) > 1 for group in groups)
    batch = sorted(groups, key=lambda group: -group.length)
    forward = multiple_choice._forward_pass(batch)
    (states_BTD,) = model.normalised_states([forward.batch])
    found = multiple_choice._log_likelihoods(model.outside, batch, forward, states_BTD)
    for group, values in zip(batch, found, strict=True):
        wanted = [log_likelihood(reference, group.context, continuation) for continuation in group.continuations]
        assert values == pytest.approx(wanted, rel=1e-4)


def test_answers_do_not_depend_on_batches(parent, tokenizer, monkeypatch):
    model = layered_parent(parent, torch.float32, CPU)
    whole = answer_items(model, encode_items(tokenizer, "b", ITEMS, 128))
    monkeypatch.setattr(multiple_choice, "BATCH_TOKENS", 1)
    monkeypatch.setitem(predictions.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(layered.GROUP_BYTES, "cpu", 4096)
    seen = []
    questions = encode_items(tokenizer, "b", ITEMS, 128)
    assert answer_items(model, questions, lambda done, total: seen.append((done, total))) == whole
    assert len(seen) > len(ITEMS)
    assert seen[-1][0] == seen[-1][1]
    assert all(before < after for (before, _), (after, _) in pairwise(seen))


def test_a_child_is_evaluated_with_its_own_answers(parent, assemble, ids_NT, tmp_path):
    child_dir = assemble("llama", MIXED)
    work = EvaluateWork(parent="p", child="c", tokens="t", tasks=(MultipleChoiceWork(name="b", items="digest"),))
    activations = Activations(tmp_path, parent, ids_NT, torch.float32, CPU)
    evaluation.capture_parent(activations)
    record = evaluation.evaluate(work, activations, child_dir, {"b": ITEMS})
    child = load_child(child_dir, torch.float32, CPU)
    plain, _ = expected(child, parent.tokenizer(), ITEMS)
    assert [task.name for task in record.tasks] == ["b"]
    assert record.tasks[0].accuracy == pytest.approx(sum(plain) / len(ITEMS))


def test_a_long_context_loses_its_start(parent, tokenizer):
    """As the harness cuts it: a choice and what fits before it."""
    item = Item(query="x" * 60 + "y" * 127, choices=("ab", "cd"), label=0)
    (group,) = multiple_choice._groups(tokenizer, "b", 0, item, 128)
    assert len(group.context) + len(group.continuations[0]) == 129
    assert group.context == tokenizer("y" * 126)["input_ids"]
    with pytest.raises(DataError, match=r"item 1, choice 1: .* at most 128"):
        list(multiple_choice._groups(tokenizer, "b", 0, Item(query="x", choices=("a" * 200, "b"), label=0), 128))


def test_a_model_that_is_not_finite_is_refused(parent, tokenizer, assemble):
    child_dir = assemble("llama")
    edit_tensors(child_dir, lambda tensors: tensors["model.norm.weight"][0].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match="benchmark b"):
        answer_items(layered_child(child_dir, torch.float32, CPU), encode_items(tokenizer, "b", ITEMS, 128))


def test_the_harness_gives_the_same_accuracies(parent, tokenizer, tmp_path):
    """The items as a task of lm-evaluation-harness, in a folder of one's own."""
    for package in evaluation._HARNESS:
        pytest.importorskip(package, reason="lm-evaluation-harness is not installed")
    items = [item for item in ITEMS if item.choices]
    lines = [json.dumps(item.model_dump(include={"query", "choices", "label"})) for item in items]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "own.yaml").write_text(harness_task(tmp_path / "items.jsonl"))
    model = load_parent(parent, torch.float32, CPU)
    found = evaluation.run_lm_eval(model, tokenizer, ("own_items",), HarnessSpec(batch_size=3), tmp_path)["own_items"]
    result = answer_items(layered_parent(parent, torch.float32, CPU), encode_items(tokenizer, "b", items, 128))
    assert found["acc,none"] == pytest.approx(result.accuracy)
    assert found["acc_norm,none"] == pytest.approx(result.accuracy_by_length)
    assert found["acc_stderr,none"] == pytest.approx(result.standard_error)


def harness_task(file: Path) -> str:
    """A task of lm-evaluation-harness over a file of items with queries."""
    return f"""
task: own_items
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {file.parent / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
