"""Replace-1-block scores (METHOD section 4; Puzzle paper, section 4.2).

A score compares the parent with a copy of it in which exactly one block is replaced: the mean over held-out tokens of
KL(parent || modified), in nats per token. The same pass gives the increase of the next-token loss and the top-1
agreement. The layers before the replaced block are unchanged and are not run again: a score starts from the stored
input of the block, or from the stored post-attention state where only the FFN is replaced, and runs the rest of the
model.

Where the parent's layers do not fit into memory, scores go side by side through the layers: each layer is loaded once
for the states of all of them, and dropped (puzzle_core/shared_sequence.py).

An iterated search replaces one block of a child instead of the parent. The result is still compared with the parent.

Legend: N windows, B batch, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.distill.losses import kl_divergence, next_token_loss
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import FORWARD_TOKENS, Activations, ChildActivations, state_bytes
from puzzle_core.model.predictions import per_token
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock
from puzzle_core.model.surgery import Subblocks, load_subblocks
from puzzle_core.shared_sequence import SharedSequence, join
from puzzle_core.state_dict import State
from puzzle_core.work import ScoreRecord, ScoreWork

COMPARED_TOKENS = 512
"""Tokens per forward pass of a score on a CPU: few enough for their activations to stay in its cache."""
SIDE_BY_SIDE = 16
"""Scores under way at a time on a device, where they share the layers that they load."""
STATE_BYTES = {"cpu": 2 * 2**30, "cuda": 16 * 2**30}
"""Largest size of the states that these scores hold between two layers, by type of device."""
JOIN_WITHIN = 8
"""A score that starts after the others have loaded this many layers loads them with those that follow it."""
BLOCK = "block"


@torch.no_grad()
def score_block(
    work: ScoreWork, activations: Activations, weights: dict[str, State], slot: ComputeSlot | None = None
) -> ScoreRecord:
    """Score one block variant.

    Args:
        activations: those of the model whose block is replaced, parent or child, captured through the last layer.
        weights: trained weights by the id of a variant or option.
        slot: the thread's compute slot; by default of a device where one thread computes at a time.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the layer and the block.
    """
    slot = slot or ComputeSlot(str(activations.device), most=1)
    suffix_of = _cached_suffix if activations.parent.fits_cache(activations.dtype) else _shared_suffix
    with suffix_of(work, activations, slot) as suffix:
        return _score(work, activations, weights, suffix)


def _score(work: ScoreWork, activations: Activations, weights: dict[str, State], suffix: "_Suffix") -> ScoreRecord:
    parent, dtype, device = activations.parent, activations.dtype, activations.device
    block = load_subblocks(parent, work.layer, work.option, weights, dtype, device, suffix.parent_block)
    comparison = _TokenComparison()
    for number, chunk in enumerate(suffix.chunks):
        hidden = [block_output(work, activations, block, rows) for rows in chunk]
        contexts = [activations.contexts(rows) for rows in chunk]
        for layer, following_block in enumerate(suffix.blocks(number), work.layer + work.span):
            hidden = [following_block(h_BTD, **c[layer]) for h_BTD, c in zip(hidden, contexts, strict=True)]
        for rows, final_BTD in zip(chunk, hidden, strict=True):
            comparison.add(activations, rows, final_BTD)
    return _record(work, activations, comparison)


class _Suffix(NamedTuple):
    """The layers after the replaced block, and the windows that go through them.

    Each chunk has window batches whose states are in memory at the same time. `blocks` gives the layers that the chunk
    of a number goes through, in order. `parent_block` gives the parent's block of the replaced layer; none where it
    comes from the parent's cache.
    """

    chunks: list[list[slice]]
    blocks: Callable[[int], Iterator[Subblocks]]
    parent_block: Callable[[], PuzzleBlock] | None = None


@contextlib.contextmanager
def _cached_suffix(work: ScoreWork, activations: Activations, slot: ComputeSlot) -> Iterator[_Suffix]:
    """The suffix from the parent's cache, which holds all of it: window batches go through it one by one."""
    blocks = [activations.block(layer) for layer in range(work.layer + work.span, activations.parent.shape.layers)]
    with slot:
        yield _Suffix([[rows] for rows in _window_batches(activations)], lambda _: iter(blocks))


@contextlib.contextmanager
def _shared_suffix(work: ScoreWork, activations: Activations, slot: ComputeSlot) -> Iterator[_Suffix]:
    """The suffix layer by layer, shared with the other scores of this process that are under way."""
    layers, batches = activations.parent.shape.layers, _window_batches(activations)
    windows = batches[0].stop - batches[0].start
    batch_bytes = state_bytes(windows, activations.ids_NT.shape[1], activations.parent.shape.hidden, activations.dtype)
    size = max(1, STATE_BYTES[activations.device.type] // (SIDE_BY_SIDE * batch_bytes))
    chunks = [batches[first : first + size] for first in range(0, len(batches), size)]

    def load(position: int, _: frozenset[str]) -> dict[str, Subblocks]:
        return {BLOCK: activations.load_block(position % layers)}

    def make() -> SharedSequence[Subblocks]:
        return SharedSequence(load, ahead=2, join_within=JOIN_WITHIN, load_computes=False)

    key = (str(activations.directory), activations.dtype, str(activations.device), "layers")
    with join(key, make, frozenset({BLOCK}), slot, first=work.layer) as reader:

        def blocks(chunk: int) -> Iterator[Subblocks]:
            following = range(work.layer + work.span, layers)
            return (reader.take(chunk * layers + layer)[BLOCK] for layer in following)

        @functools.cache
        def parent_block() -> PuzzleBlock:
            return reader.take(work.layer)[BLOCK].attention

        yield _Suffix(chunks, blocks, None if isinstance(activations, ChildActivations) else parent_block)


def _window_batches(activations: Activations) -> list[slice]:
    tokens = COMPARED_TOKENS if activations.device.type == "cpu" else FORWARD_TOKENS
    windows = max(1, tokens // activations.ids_NT.shape[1])
    return [slice(first, first + windows) for first in range(0, len(activations.ids_NT), windows)]


def block_output(work: ScoreWork, activations: Activations, block: Subblocks, rows: slice) -> torch.Tensor:
    """What leaves the replaced block, (B, T, D), for some windows of the stored states."""
    if not work.whole and work.block.attention == activations.attention(work.layer):
        return block.feed(activations.post_attention(work.layer)[rows].to(activations.device))
    input_BTD = activations.layer_input(work.layer)[rows].to(activations.device)
    return block(input_BTD, **activations.contexts(rows)[work.layer])


class _TokenComparison:
    """Running sums over the compared tokens."""

    kl = loss_increase = agreed = 0.0

    def add(self, activations: Activations, rows: slice, final_BTD: torch.Tensor) -> None:
        """Compare the predictions from the last layer's output with the parent's, and add the results to the sums."""
        outside, ids_BT = activations.outside(), activations.ids_NT[rows].long().to(final_BTD.device)
        kl_BT, increase_BT, agreed_BT = per_token(
            _differences, activations.predictions(rows), outside, outside.model.normalise(final_BTD), ids_BT
        )
        self.kl += kl_BT.sum(dtype=torch.float64).item()
        self.loss_increase += increase_BT[:, :-1].sum(dtype=torch.float64).item()
        self.agreed += agreed_BT.sum().item()


def _differences(
    parent_CV: torch.Tensor, child_CV: torch.Tensor, following_C: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """KL, the increase of the next-token loss, and whether both have the same first choice."""
    return (
        kl_divergence(parent_CV, child_CV),
        next_token_loss(child_CV, following_C) - next_token_loss(parent_CV, following_C),
        parent_CV.argmax(-1) == child_CV.argmax(-1),
    )


def _record(work: ScoreWork, activations: Activations, comparison: _TokenComparison) -> ScoreRecord:
    windows, length = activations.ids_NT.shape
    values = (
        comparison.kl / (windows * length),
        comparison.loss_increase / (windows * (length - 1)),
        comparison.agreed / (windows * length),
    )
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"the score of layer {work.layer} {work.block} is not finite (KL {values[0]})")
    return ScoreRecord(
        layer=work.layer,
        block=work.block,
        span=work.span,
        kl_nats_per_token=max(values[0], 0.0),
        lm_loss_increase_nats_per_token=values[1],
        top1_agreement=values[2],
        tokens=windows * length,
    )
