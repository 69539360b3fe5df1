"""Comparison of child and parent on held-out text: KL, perplexity, top-1 accuracy and agreement (METHOD section 7).

Legend: N windows, B batch, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch

from puzzle_core.data import read_windows
from puzzle_core.device import default_device
from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.errors import NonFiniteError, SpecError
from puzzle_core.model.activations import FORWARD_TOKENS
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.model.predictions import from_states, per_token
from puzzle_core.work import EvaluateWork, EvaluationRecord


@torch.no_grad()
def evaluate(work: EvaluateWork, parent: Parent, child_dir: Path | None, tokens_dir: Path) -> EvaluationRecord:
    """Evaluate the child in `child_dir`, or the parent where that is None, in float32.

    Raises:
        NonFiniteError: the model's loss or KL is NaN or infinite.
        SpecError: `work` has lm-eval tasks, and the harness is not installed or does not know one of them.
    """
    device = default_device()
    reference = load_parent(parent, torch.float32, device)
    model = load_child(child_dir, torch.float32, device) if child_dir else reference
    windows_NT = read_windows(tokens_dir)
    kl = loss = correct = agreed = 0.0
    for batch in torch.split(windows_NT, max(1, FORWARD_TOKENS // windows_NT.shape[1])):
        ids_BT = batch.long().to(device)
        parent_BTD = reference.model(input_ids=ids_BT).last_hidden_state
        child_BTD = parent_BTD if model is reference else model.model(input_ids=ids_BT).last_hidden_state
        kl_BT, loss_BT, correct_BT, agreed_BT = per_token(
            _comparison, from_states(reference, parent_BTD), model, child_BTD, ids_BT
        )
        kl += kl_BT.sum(dtype=torch.float64).item()
        loss += loss_BT[:, :-1].sum(dtype=torch.float64).item()
        correct += correct_BT[:, :-1].sum().item()
        agreed += agreed_BT.sum().item()
    tokens, predictions = windows_NT.numel(), windows_NT.numel() - len(windows_NT)
    if not math.isfinite(kl + loss):
        raise NonFiniteError(f"evaluation of {work.child or 'the parent'} gave a loss of {loss} and a KL of {kl}")
    return EvaluationRecord(
        kl_nats_per_token=max(kl / tokens, 0.0),
        lm_loss_nats_per_token=loss / predictions,
        perplexity=math.exp(loss / predictions),
        top1_accuracy=correct / predictions,
        top1_agreement=agreed / tokens,
        tokens=tokens,
        lm_eval=run_lm_eval(model, parent.tokenizer(), work.lm_eval_tasks) if work.lm_eval_tasks else {},
    )


def _comparison(parent_CV: torch.Tensor, child_CV: torch.Tensor, following_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL, next-token loss, and whether the child's first choice follows and is the parent's first choice."""
    choice_C = child_CV.argmax(-1)
    return (
        kl_divergence(parent_CV, child_CV),
        next_token_loss(child_CV, following_C),
        choice_C == following_C,
        choice_C == parent_CV.argmax(-1),
    )


def check_lm_eval(tasks: tuple[str, ...]) -> None:
    """Check that lm-evaluation-harness is installed if there are tasks for it.

    Raises:
        SpecError: the harness is not installed.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise SpecError("evaluation.lm_eval_tasks needs lm-evaluation-harness: pip install lm-eval")


def run_lm_eval(model: Any, tokenizer: Any, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness by name; return the value of each metric by task and metric name.

    Raises:
        SpecError: the harness is not installed, or does not know a task.
    """
    check_lm_eval(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        results = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    except KeyError as error:
        raise SpecError(f"lm-evaluation-harness does not know the task {error}") from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results["results"].items()
    }
