"""Comparison of child and parent on held-out text: KL, perplexity, top-1 accuracy and agreement (METHOD section 7).

Legend: N windows, B batch, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import difflib
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from puzzle_core.benchmark_items import Item
from puzzle_core.data import read_windows
from puzzle_core.device import default_device
from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.errors import NonFiniteError, SpecError
from puzzle_core.model.activations import FORWARD_TOKENS
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.model.predictions import from_states, per_token
from puzzle_core.multiple_choice import answer_items
from puzzle_core.spec import EvaluationSpec, HarnessSpec
from puzzle_core.work import EvaluateWork, EvaluationRecord

log = logging.getLogger("puzzle")
_HARNESS = ("lm_eval", "accelerate", "peft")
"""What lm-evaluation-harness imports to run a model of transformers."""


@torch.no_grad()
def evaluate(
    work: EvaluateWork,
    parent: Parent,
    child_dir: Path | None,
    tokens_dir: Path,
    benchmarks: Mapping[str, Sequence[Item]] = MappingProxyType({}),
    task_folder: Path | None = None,
) -> EvaluationRecord:
    """Evaluate the child in `child_dir`, or the parent where that is None, in float32.

    Args:
        benchmarks: the items of `work.tasks` by name.
        task_folder: with further tasks of lm-evaluation-harness.

    Raises:
        DataError: an item has no tokens, or does not fit into the context.
        NonFiniteError: the model's loss, KL or a log-likelihood is NaN or infinite.
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
        lm_eval=run_lm_eval(model, parent.tokenizer(), work.lm_eval_tasks, work.lm_eval, task_folder)
        if work.lm_eval_tasks
        else {},
        tasks=tuple(
            answer_items(model, parent.tokenizer(), task.name, benchmarks[task.name], _log_progress(task.name))
            for task in work.tasks
        ),
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


def check_lm_eval(spec: EvaluationSpec) -> None:
    """Check that lm-evaluation-harness can run the tasks that a spec names for it, if there are any.

    Raises:
        SpecError: the harness is not installed, does not know a task, or options have no task; the folder is missing.
    """
    tasks, options = spec.lm_eval_tasks, spec.lm_eval
    if not tasks:
        if options != HarnessSpec():
            raise SpecError("evaluation.lm_eval has options, but evaluation.lm_eval_tasks names no task: name one")
        return
    if lacking := [package for package in _HARNESS if importlib.util.find_spec(package) is None]:
        raise SpecError(
            f"evaluation.lm_eval_tasks needs lm-evaluation-harness, and {', '.join(lacking)} is missing here: "
            "pip install 'lm-eval[hf]>=0.4.13'"
        )
    if options.task_folder and not Path(options.task_folder).is_dir():
        raise SpecError(f"evaluation.lm_eval.task_folder {options.task_folder!r} is no directory here")
    _known_tasks(tasks, Path(options.task_folder) if options.task_folder else None)


def _known_tasks(tasks: tuple[str, ...], folder: Path | None) -> Any:
    """The harness's manager of tasks, which knows all of these.

    Raises:
        SpecError: it does not know one.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        nearest = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"near it: {', '.join(nearest)}" if nearest else "`lm-eval ls tasks` lists those that it knows"
        raise SpecError(f"evaluation.lm_eval_tasks: lm-evaluation-harness does not know {', '.join(unknown)}; {hint}")
    return manager


def run_lm_eval(
    model: Any, tokenizer: Any, tasks: tuple[str, ...], options: HarnessSpec, task_folder: Path | None = None
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness by name; return the value of each metric by task and metric name.

    Raises:
        SpecError: the harness does not know a task.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        tasks=list(tasks),
        num_fewshot=options.few_shot,
        limit=options.limit,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
        task_manager=_known_tasks(tasks, task_folder),
        log_samples=False,
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results["results"].items()
    }


def _log_progress(name: str) -> Callable[[int, int], None]:
    """A function that logs at most every ten seconds how far a benchmark is."""
    logged_at = time.monotonic()

    def log_progress(done: int, total: int) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at > 10:
            logged_at = time.monotonic()
            log.info("benchmark %s: %d of %d tokens", name, done, total)

    return log_progress
