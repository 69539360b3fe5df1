"""Evaluation: the numbers of plain loops, no difference at all for the parent, and a golden that a guesser fails."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core import evaluation
from puzzle_core.errors import NonFiniteError, SpecError
from puzzle_core.evaluation import check_lm_eval
from puzzle_core.model.child import load_child
from puzzle_core.spec import EvaluationSpec, HarnessSpec
from puzzle_core.work import EvaluateWork
from tests.conftest import CPU, MIXED
from tests.pico import SIZES, edit_tensors
from tests.reference.quality import comparison

WORK = EvaluateWork(parent="p", child="c", tokens="t")


@pytest.fixture
def evaluate(parent, tokens_dir):
    """Evaluate a child against the plain parent."""
    return lambda child_dir: evaluation.evaluate(WORK, parent, child_dir, tokens_dir)


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


def test_numbers_do_not_depend_on_the_rows_of_a_batch(evaluate, assemble, monkeypatch):
    child_dir = assemble("llama", MIXED)
    whole = evaluate(child_dir)
    monkeypatch.setattr(evaluation, "FORWARD_TOKENS", 64)
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
