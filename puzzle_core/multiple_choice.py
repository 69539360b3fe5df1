"""Multiple-choice benchmarks: the likeliest continuation wins, as lm-evaluation-harness counts it (METHOD section 7).

The choices of one query are computed in one forward pass behind the query that they share: a choice sees the query and
itself, at the positions that follow the query. The head runs on the scored positions alone.

Legend: B sequences, T tokens, P scored positions, D hidden width, V vocabulary.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from puzzle_core.benchmark_items import Item
from puzzle_core.distill.losses import next_token_loss
from puzzle_core.errors import DataError, NonFiniteError
from puzzle_core.model.layered import Batch, LayeredModel
from puzzle_core.model.predictions import chunks, log_probabilities
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.progress import Report, no_report
from puzzle_core.work import MultipleChoiceResult

BATCH_TOKENS = 2048
"""Tokens of a forward pass, padding included."""


class _Group(NamedTuple):
    """Tokens of a context and of the continuations that follow it; `places` has (item, choice) of each of these."""

    context: list[int]
    continuations: list[list[int]]
    places: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Tokens of the forward pass: the last token of a continuation predicts nothing."""
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


class Questions(NamedTuple):
    """A benchmark in tokens: its items, and the batches of contexts and continuations that they ask for."""

    name: str
    items: Sequence[Item]
    batches: list[list[_Group]]

    @property
    def tokens(self) -> int:
        """Tokens of all forward passes, padding included."""
        return sum(batch[0].length * len(batch) for batch in self.batches)


def encode_items(tokenizer: Any, name: str, items: Sequence[Item], limit: int) -> Questions:
    """The tokens of a benchmark.

    Args:
        tokenizer: the parent's.
        name: of the benchmark, for the result and errors.
        items: its questions.
        limit: tokens of a context and a choice, at most.

    Raises:
        DataError: the tokenizer gives a choice no tokens, or a choice does not fit into the context.
    """
    groups = [group for number, item in enumerate(items) for group in _groups(tokenizer, name, number, item, limit)]
    return Questions(name, items, list(_batches(groups)))


@torch.no_grad()
def answer_items(model: LayeredModel, questions: Questions, report: Report = no_report) -> MultipleChoiceResult:
    """Accuracy of a model on one benchmark.

    Args:
        model: what answers.
        questions: the benchmark, in its tokenizer's tokens.
        report: called after each batch in each layer with tokens times layers.

    Raises:
        NonFiniteError: a log-likelihood is NaN or infinite.
    """
    name, items, batches = questions
    likelihoods = [[0.0] * len(item.options()) for item in items]
    passes = [_forward_pass(batch) for batch in batches]
    states = model.normalised_states([forward.batch for forward in passes], report)
    for batch, forward, hidden_BTD in zip(batches, passes, states, strict=True):
        for group, found in zip(batch, _log_likelihoods(model.outside, batch, forward, hidden_BTD), strict=True):
            for (item, choice), value in zip(group.places, found, strict=True):
                likelihoods[item][choice] = value
    if not all(math.isfinite(value) for values in likelihoods for value in values):
        raise NonFiniteError(f"benchmark {name}: a log-likelihood is NaN or infinite")
    plain = [_wins(values, item.label) for values, item in zip(likelihoods, items, strict=True)]
    by_length = [
        _wins([value / len(text) for value, (_, text) in zip(values, item.options(), strict=True)], item.label)
        for values, item in zip(likelihoods, items, strict=True)
    ]
    return MultipleChoiceResult(
        name=name,
        items=len(items),
        accuracy=statistics.fmean(plain),
        standard_error=_standard_error(plain),
        accuracy_by_length=statistics.fmean(by_length),
        standard_error_by_length=_standard_error(by_length),
    )


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of the continuation that follows it after one blank, as lm-evaluation-harness has them.

    Blanks at the context's end belong to the continuation. The continuation has the tokens of the whole text behind as
    many as the context has alone. An empty context is the token that starts or ends a text.
    """
    bare = context.rstrip()
    begin = _encode(tokenizer, bare)
    whole = _encode(tokenizer, f"{context} {continuation}")
    edge = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return begin or ([] if edge is None else [edge]), whole[len(begin) :]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with the start token where the tokenizer adds one, and without an end token."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer("")["input_ids"][:1]
    adds_start = start and start[0] == tokenizer.bos_token_id and tokens[:1] != start
    return [*start, *tokens] if adds_start else tokens


def _groups(tokenizer: Any, name: str, number: int, item: Item, limit: int) -> Iterator[_Group]:
    """The groups of an item: one for the choices behind the same tokens of context."""
    by_context: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for choice, (context, continuation) in enumerate(item.options()):
        begin, end = encode_pair(tokenizer, context, continuation)
        if not begin or not end or len(end) > limit:
            raise DataError(
                f"benchmark {name}, item {number + 1}, choice {choice + 1}: {len(begin)} tokens of context and "
                f"{len(end)} of the choice, where each has to have one and the choice at most {limit}"
            )
        kept = begin[-(limit + 1 - len(end)) :]
        by_context.setdefault(tuple(kept), []).append((choice, end))
    for tokens, choices in by_context.items():
        yield _Group(list(tokens), [end for _, end in choices], [(number, choice) for choice, _ in choices])


def _batches(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Groups of similar length, the longest first: a batch that does not fit into memory fails at once."""
    batch: list[_Group] = []
    for group in sorted(groups, key=lambda group: -group.length):
        if batch and batch[0].length * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(group)
    yield batch


class _ForwardPass(NamedTuple):
    """The tokens of some groups; row and place of the scored positions, and the token that each of them predicts."""

    batch: Batch
    scored: list[tuple[int, int]]
    targets: list[int]


def _forward_pass(groups: list[_Group]) -> _ForwardPass:
    """One sequence per group: its context, and behind it the continuations, which do not see each other."""
    length = groups[0].length
    ids_BT = torch.zeros(len(groups), length, dtype=torch.long)
    positions_BT = torch.zeros(len(groups), length, dtype=torch.long)
    segments_BT = torch.full((len(groups), length), -1)
    scored: list[tuple[int, int]] = []
    targets_P: list[int] = []
    for row, group in enumerate(groups):
        width = end = len(group.context)
        ids_BT[row, :width] = torch.tensor(group.context)
        positions_BT[row, :width] = torch.arange(width)
        segments_BT[row, :width] = 0
        for segment, continuation in enumerate(group.continuations, start=1):
            inner = len(continuation) - 1
            ids_BT[row, end : end + inner] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions_BT[row, end : end + inner] = torch.arange(width, width + inner)
            segments_BT[row, end : end + inner] = segment
            scored += [(row, width - 1), *((row, place) for place in range(end, end + inner))]
            targets_P += continuation
            end += inner
    return _ForwardPass(Batch(ids_BT, positions_BT, segments_BT), scored, targets_P)


def _log_likelihoods(
    outside: PuzzleForCausalLM, groups: list[_Group], forward: _ForwardPass, normalised_BTD: torch.Tensor
) -> list[list[float]]:
    """The log-likelihood of every continuation of every group, in nats, from what leaves the final norm."""
    device = normalised_BTD.device
    rows_P, places_P = torch.tensor(forward.scored, device=device).unbind(1)
    scored_PD, losses = normalised_BTD[rows_P, places_P], list[float]()
    for part in chunks(len(forward.scored), outside.config.vocab_size, device):
        predicted_PV = log_probabilities(outside, scored_PD[part])
        losses += next_token_loss(predicted_PV, torch.tensor(forward.targets[part], device=device)).tolist()
    values = iter(-loss for loss in losses)
    return [[sum(next(values) for _ in continuation) for continuation in group.continuations] for group in groups]


def _wins(values: Sequence[float], label: int) -> float:
    """1 where the label's value is the largest, the first of equal ones."""
    return float(values.index(max(values)) == label)


def _standard_error(outcomes: Sequence[float]) -> float:
    """Standard error of the mean, from the sample variance; 0 of a single item."""
    return statistics.stdev(outcomes) / math.sqrt(len(outcomes)) if len(outcomes) > 1 else 0.0
