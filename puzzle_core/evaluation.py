"""Comparison of child and parent on held-out text: KL, perplexity, top-1 accuracy and agreement (METHOD section 7).

The parent runs once; what it predicts is compared with every model. Parent and child run layer by layer, so neither has
to fit into memory.

Legend: N windows, B batch, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import difflib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from puzzle_core.benchmark_items import Item
from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.errors import NonFiniteError, SpecError
from puzzle_core.model.activations import Activations, drop_layer
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.layered import Batch, LayeredModel, layered_child, layered_parent
from puzzle_core.model.predictions import Measure, per_token
from puzzle_core.multiple_choice import answer_items, encode_items
from puzzle_core.progress import Report, no_report
from puzzle_core.spec import EvaluationSpec, HarnessSpec
from puzzle_core.work import EvaluateWork, EvaluationRecord

_HARNESS = ("lm_eval", "accelerate", "peft")
"""What lm-evaluation-harness imports to run a model of transformers."""


def capture_parent(activations: Activations, report: Report = no_report) -> None:
    """Run the parent on all windows, and store what evaluations of all models compare with.

    That is what leaves its last layer and, where they are small, its log-probabilities. One layer and its states are in
    memory at a time.

    Raises:
        StorageError: the scratch disk has no room for the states of two layers.
    """
    layers = activations.parent.shape.layers
    if not activations.has_layer_input(layers):
        activations.capture_embedding()
        for layer in range(layers):
            activations.capture_layer(layer, keep_post_attention=False)
            drop_layer(activations.directory, layer)
            report(layer + 1, layers)
    activations.capture_log_probabilities()


@torch.no_grad()
def evaluate(
    work: EvaluateWork,
    activations: Activations,
    child_dir: Path | None,
    benchmarks: Mapping[str, Sequence[Item]] = MappingProxyType({}),
    task_folder: Path | None = None,
    report: Report = no_report,
) -> EvaluationRecord:
    """Evaluate the child in `child_dir`, or the parent where that is None, in the type of the activations.

    Args:
        activations: those of the parent, after `capture_parent`.
        benchmarks: the items of `work.tasks` by name.
        task_folder: with further tasks of lm-evaluation-harness, which needs the whole model in memory.
        report: called with tokens times layers of text and benchmarks.

    Raises:
        DataError: an item has no tokens, or does not fit into the context.
        NonFiniteError: the model's loss, KL or a log-likelihood is NaN or infinite.
        SpecError: `work` has lm-eval tasks, and the harness is not installed or does not know one of them.
    """
    parent, dtype, device = activations.parent, activations.dtype, activations.device
    model = layered_child(child_dir, dtype, device) if child_dir else layered_parent(parent, dtype, device)
    tokenizer, context = parent.tokenizer() if work.tasks or work.lm_eval_tasks else None, parent.shape.max_positions
    questions = [encode_items(tokenizer, task.name, benchmarks[task.name], context) for task in work.tasks]
    text_tokens = activations.ids_NT.numel() if child_dir else 0
    parts = _report_parts([model.layers * tokens for tokens in (text_tokens, *(q.tokens for q in questions))], report)
    quality = _compare_with_parent(work, activations, model if child_dir else None, parts[0])
    answers = [answer_items(model, *part) for part in zip(questions, parts[1:], strict=True)]
    harness: dict[str, dict[str, float]] = {}
    if work.lm_eval_tasks:
        whole = load_child(child_dir, dtype, device) if child_dir else load_parent(parent, dtype, device)
        harness = run_lm_eval(whole, tokenizer, work.lm_eval_tasks, work.lm_eval, task_folder)
    return EvaluationRecord(**quality, lm_eval=harness, tasks=tuple(answers))


def _compare_with_parent(
    work: EvaluateWork, activations: Activations, model: LayeredModel | None, report: Report
) -> dict[str, Any]:
    """The fields of a record that follow from the held-out windows; without a model, those of the parent."""
    windows, last = [*activations.batches()], activations.parent.shape.layers
    outside, ids_NT = activations.outside(), activations.ids_NT
    kl = loss = correct = agreed = 0.0
    measure: Measure
    if model:
        positions_NT = activations.positions_NT
        batches = [Batch(ids_NT[rows], None if positions_NT is None else positions_NT[rows]) for rows in windows]
        states = model.normalised_states(batches, report)
        head, measure = model.outside, _comparison
    else:
        final_NTD = activations.layer_input(last)
        states = (outside.model.normalise(final_NTD[rows].to(activations.device)) for rows in windows)
        head, measure = outside, _comparison_with_itself
    for rows, normalised_BTD in zip(windows, states, strict=True):
        ids_BT = ids_NT[rows].long().to(activations.device)
        kl_BT, loss_BT, correct_BT, agreed_BT = per_token(
            measure, activations.predictions(rows), head, normalised_BTD, ids_BT
        )
        kl += kl_BT.sum(dtype=torch.float64).item()
        loss += loss_BT[:, :-1].sum(dtype=torch.float64).item()
        correct += correct_BT[:, :-1].sum().item()
        agreed += agreed_BT.sum().item()
    tokens, predictions = ids_NT.numel(), ids_NT.numel() - len(ids_NT)
    if not math.isfinite(kl + loss):
        raise NonFiniteError(f"evaluation of {work.child or 'the parent'} gave a loss of {loss} and a KL of {kl}")
    return {
        "kl_nats_per_token": max(kl / tokens, 0.0),
        "lm_loss_nats_per_token": loss / predictions,
        "perplexity": math.exp(loss / predictions),
        "top1_accuracy": correct / predictions,
        "top1_agreement": agreed / tokens,
        "tokens": tokens,
    }


def _report_parts(sizes: Sequence[int], report: Report) -> list[Report]:
    """A report for each of several parts of these sizes, which adds what lies before the part."""
    total = sum(sizes)

    def of_part(number: int) -> Report:
        before = sum(sizes[:number])
        return lambda done, _: report(before + done, total)

    return [of_part(number) for number in range(len(sizes))]


def _comparison(parent_CV: torch.Tensor, child_CV: torch.Tensor, following_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL, next-token loss, and whether the child's first choice follows and is the parent's first choice."""
    choice_C = child_CV.argmax(-1)
    return (
        kl_divergence(parent_CV, child_CV),
        next_token_loss(child_CV, following_C),
        choice_C == following_C,
        choice_C == parent_CV.argmax(-1),
    )


def _comparison_with_itself(
    parent_CV: torch.Tensor, _: torch.Tensor, following_C: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """That of the parent, which differs from itself in nothing, whatever the order of operations of a second pass."""
    return _comparison(parent_CV, parent_CV, following_C)


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
