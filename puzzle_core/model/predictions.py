"""Next-token distributions of parent and child, compared without the logits of a whole batch in memory.

Logits are larger than the states that they come from by vocabulary / hidden width, and a comparison needs several
tensors of their size. So states go through the heads of both models chunk by chunk; in training, a chunk's logits are
computed again in the backward pass.

Legend: B batch, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint as recompute_activations

from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Largest size of a chunk's logits in float32, by type of device."""

Chunk = Callable[[slice], torch.Tensor]
"""Log-probabilities, float32 (C, V), of some tokens of a batch, which are counted through all its windows."""
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""Values per token, each (C,), of the parent's and the child's log-probabilities (C, V) and the next tokens (C,)."""


def log_probabilities(model: PuzzleForCausalLM, normalised_CD: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities, float32 (C, V), of what leaves the final norm."""
    logits: torch.Tensor = model.head(normalised_CD)
    return logits.float().log_softmax(-1)


def from_states(model: PuzzleForCausalLM, normalised_BTD: torch.Tensor) -> Chunk:
    """The log-probabilities of a batch by its states, computed when they are asked for."""
    normalised_ND = normalised_BTD.flatten(0, 1)
    return lambda part: log_probabilities(model, normalised_ND[part])


def chunks(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Ranges of tokens whose logits take at most CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def per_token(
    measure: Measure, parent: Chunk, child: PuzzleForCausalLM, normalised_BTD: torch.Tensor, ids_BT: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Compare the predictions of parent and child token by token.

    Args:
        measure: computes the values that are asked for.
        parent: the parent's log-probabilities; no gradient goes through them.
        child: the model whose head is applied.
        normalised_BTD: what leaves the child's final norm.
        ids_BT: the tokens; the token that follows the last one of a window is not known, and its values have no
            meaning where they depend on it.

    Returns:
        The values, each (B, T), in the order of `measure`.
    """
    normalised_ND, following_N = normalised_BTD.flatten(0, 1), ids_BT.roll(-1, 1).flatten()

    def compare(normalised_CD: torch.Tensor, part: slice) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            parent_CV = parent(part)
        return measure(parent_CV, log_probabilities(child, normalised_CD), following_N[part])

    parts = list(chunks(len(normalised_ND), child.config.vocab_size, normalised_BTD.device))
    again = torch.is_grad_enabled() and len(parts) > 1
    values = [
        recompute_activations(compare, normalised_ND[part], part, use_reentrant=False, preserve_rng_state=False)
        if again
        else compare(normalised_ND[part], part)
        for part in parts
    ]
    return tuple(torch.cat(columns).view_as(ids_BT) for columns in zip(*values, strict=True))
