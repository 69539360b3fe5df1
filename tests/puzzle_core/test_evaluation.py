"""Evaluation: the numbers of plain loops, no difference at all for the parent, and a golden that a guesser fails."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core import evaluation
from puzzle_core.benchmark_items import Item
from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.errors import NonFiniteError, SpecError
from puzzle_core.evaluation import check_lm_eval
from puzzle_core.model import layered
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.spec import EvaluationSpec, HarnessSpec
from puzzle_core.work import EvaluateWork, MultipleChoiceWork
from tests.conftest import CPU, MIXED
from tests.pico import SIZES, edit_tensors
from tests.reference.quality import comparison

WORK = EvaluateWork(parent="p", child="c", tokens="t")


@pytest.fixture
def states(parent, ids_NT, tmp_path):
    """The states of the plain parent that evaluations compare with."""
    activations = Activations(tmp_path / "states", parent, ids_NT, torch.float32, CPU)
    evaluation.capture_parent(activations)
    return activations


@pytest.fixture
def evaluate(states):
    """Evaluate a child against the plain parent."""
    return lambda child_dir: evaluation.evaluate(WORK, states, child_dir)


def test_the_parent_runs_once_and_leaves_its_last_states_alone(states, monkeypatch, assemble):
    child_dir, names = assemble("llama", MIXED), sorted(file.name for file in states.directory.iterdir())
    assert names == ["layer-input-005.bin", "log-probabilities.bin"]
    monkeypatch.setattr(Activations, "capture_layer", lambda *_: pytest.fail("the parent runs again"))
    evaluation.capture_parent(states)
    monkeypatch.setattr(states.parent, "block", lambda *_: pytest.fail("the parent runs again"))
    for evaluated in (child_dir, None):
        assert evaluation.evaluate(WORK, states, evaluated).tokens == states.ids_NT.numel()


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "mistral-window", "gemma2"])
def test_numbers_are_bitwise_those_of_whole_models(name, parent_of, assemble, ids_NT, tmp_path):
    activations = Activations(tmp_path / "states", parent_of(name), ids_NT, torch.float32, CPU)
    evaluation.capture_parent(activations)
    child_dir = assemble(name, MIXED)
    found = evaluation.evaluate(WORK, activations, child_dir)
    whole = [load_parent(parent_of(name), torch.float32, CPU), load_child(child_dir, torch.float32, CPU)]
    with torch.no_grad():
        parent_BTV, child_BTV = (model(input_ids=ids_NT.long()).logits.log_softmax(-1) for model in whole)
    assert found.kl_nats_per_token == kl_divergence(parent_BTV, child_BTV).sum(dtype=torch.float64).item() / 96
    loss = next_token_loss(child_BTV[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten().long())
    assert found.lm_loss_nats_per_token == loss.sum(dtype=torch.float64).item() / 90


def test_a_type_of_products_that_is_narrower_gives_other_numbers_near_by(parent, assemble, ids_NT, tmp_path, evaluate):
    half = Activations(tmp_path / "half", parent, ids_NT, torch.bfloat16, CPU)
    evaluation.capture_parent(half)
    child_dir = assemble("llama", MIXED)
    found, exact = evaluation.evaluate(WORK, half, child_dir), evaluate(child_dir)
    assert found.kl_nats_per_token != exact.kl_nats_per_token
    assert found.kl_nats_per_token == pytest.approx(exact.kl_nats_per_token, rel=0.05)
    assert evaluation.evaluate(WORK, half, None).kl_nats_per_token == 0


def test_progress_covers_the_text_and_every_benchmark(states, assemble):
    work = WORK.model_copy(update={"tasks": (MultipleChoiceWork(name="b", items="digest"),)})
    items = [Item(query="a b", choices=("c d", "e"), label=0)]
    seen = []
    evaluation.evaluate(work, states, assemble("llama", MIXED), {"b": items}, report=lambda *at: seen.append(at))
    (total,) = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert done == sorted(set(done))
    assert (done[-1], total > 5 * 96) == (total, True)


def test_a_child_has_the_numbers_of_plain_loops(evaluate, assemble, checkpoint_of, ids_NT):
    child_dir = assemble("llama", MIXED)
    ids_BT = ids_NT.long()
    with torch.no_grad():
        parent_BTV = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"))(input_ids=ids_BT).logits
        child_BTV = load_child(child_dir, torch.float32, CPU)(input_ids=ids_BT).logits
    expected, found = comparison(parent_BTV, child_BTV, ids_BT), evaluate(child_dir)
    assert found.kl_nats_per_token == pytest.approx(expected["kl"], rel=1e-4)
    assert found.lm_loss_nats_per_token == pytest.approx(expected["loss"], rel=1e-5)
    assert found.perplexity == pytest.approx(torch.tensor(expected["loss"]).exp().item(), rel=1e-4)
    assert found.top1_accuracy == expected["accuracy"]
    assert found.top1_agreement == expected["agreement"]
    assert found.tokens == ids_NT.numel()


def test_the_parent_and_its_copy_differ_in_nothing(evaluate, assemble):
    itself, copy = evaluate(None), evaluate(assemble("llama"))
    assert copy == itself
    assert (itself.kl_nats_per_token, itself.top1_agreement) == (0.0, 1.0)


def test_numbers_do_not_depend_on_batches_and_groups(evaluate, states, assemble, monkeypatch):
    child_dir = assemble("llama", MIXED)
    whole = evaluate(child_dir)
    states.rows = 4
    monkeypatch.setitem(layered.GROUP_BYTES, "cpu", 1)
    assert evaluate(child_dir).kl_nats_per_token == pytest.approx(whole.kl_nats_per_token, rel=1e-5)


def test_a_guesser_has_the_perplexity_of_the_vocabulary_and_fails_the_golden(evaluate, assemble):
    child_dir = assemble("llama")
    edit_tensors(child_dir, lambda tensors: tensors["lm_head.weight"].zero_())
    guesser = evaluate(child_dir)
    assert guesser.perplexity == pytest.approx(SIZES["vocab_size"], rel=1e-5)
    assert guesser.kl_nats_per_token > 0.1


def test_a_child_that_is_not_finite_is_refused(evaluate, assemble):
    child_dir = assemble("llama")
    edit_tensors(child_dir, lambda tensors: tensors["model.norm.weight"][0].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match="evaluation of c gave a loss of nan"):
        evaluate(child_dir)


def test_a_missing_harness_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_lm_eval(EvaluationSpec())
    with pytest.raises(SpecError, match="install 'lm-eval"):
        check_lm_eval(EvaluationSpec(lm_eval_tasks=("hellaswag",)))


def test_options_of_the_harness_without_a_task_are_refused():
    with pytest.raises(SpecError, match="names no task"):
        check_lm_eval(EvaluationSpec(lm_eval=HarnessSpec(few_shot=2)))


def test_a_task_that_the_harness_does_not_know_is_named_before_the_run(tmp_path):
    for package in evaluation._HARNESS:
        pytest.importorskip(package, reason="lm-evaluation-harness is not installed")
    with pytest.raises(SpecError, match=r"does not know hellaswagg; near it: .*hellaswag"):
        check_lm_eval(EvaluationSpec(lm_eval_tasks=("hellaswag", "hellaswagg")))
    options = HarnessSpec(task_folder=str(tmp_path / "missing"))
    with pytest.raises(SpecError, match="is no directory here"):
        check_lm_eval(EvaluationSpec(lm_eval_tasks=("hellaswag",), lm_eval=options))
