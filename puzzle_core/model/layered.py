"""A model of which one block at a time is in memory, so that no device has to hold it whole.

Batches of tokens go through the model layer by layer: a block is loaded once for as many of them as states fit into
GROUP_BYTES. Weights that are stored in the type of the computation are mapped from their file on a CPU.

Legend: B sequences, T tokens, D hidden width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from puzzle_core.errors import ArtifactError
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.model.child_config import read_child_config
from puzzle_core.model.parent import Parent, contexts_by_kind, load_block, load_outside, tensor_shapes
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock, PuzzleForCausalLM, own_window
from puzzle_core.progress import Report, no_report

GROUP_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Largest size of the states that go through the layers together, by type of device."""


class Batch(NamedTuple):
    """Tokens of a forward pass; all are (B, T).

    Positions count from 0 and every token sees those before it, unless positions are given: where they do not go on,
    another document begins, whose tokens see none before it. With segments, a token sees those before it in segment 0
    and in its own segment; segment -1 is padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None


class LayeredModel:
    """What lies outside a model's blocks, and a function that loads its blocks."""

    def __init__(self, outside: PuzzleForCausalLM, layers: int, block: Callable[[int], PuzzleBlock]):
        """A model of so many layers."""
        self.outside, self.layers, self.block = outside, layers, block

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.outside.lm_head.weight.device  # type: ignore[no-any-return]

    @torch.no_grad()
    def normalised_states(self, batches: Sequence[Batch], report: Report = no_report) -> Iterator[torch.Tensor]:
        """What leaves the final norm, (B, T, D), of every batch.

        Args:
            batches: what is computed.
            report: called after every batch in every layer with tokens times layers.
        """
        total, done = self.layers * sum(batch.ids.numel() for batch in batches), 0
        for group in self._groups(batches):
            states = [self.outside.model.embed(batch.ids.long().to(self.device)) for batch in group]
            contexts = [self._contexts(batch) for batch in group]
            for layer in range(self.layers):
                block = self.block(layer)
                for number, batch in enumerate(group):
                    states[number] = block(states[number], **contexts[number][block.attention_kind])
                    done += batch.ids.numel()
                    report(done, total)
            for number in range(len(group)):
                yield self.outside.model.normalise(states[number])
                states[number] = states[number].new_empty(0)

    def _groups(self, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Batches whose states together take at most GROUP_BYTES, in their order."""
        weight = self.outside.lm_head.weight
        token_bytes = weight.shape[1] * weight.element_size()
        group, size = list[Batch](), 0
        for batch in batches:
            needed = batch.ids.numel() * token_bytes
            if group and size + needed > GROUP_BYTES.get(self.device.type, GROUP_BYTES["cuda"]):
                yield group
                group, size = [], 0
            group.append(batch)
            size += needed
        if group:
            yield group

    def _contexts(self, batch: Batch) -> dict[str, dict[str, Any]]:
        """The keyword arguments of the blocks, by kind of attention."""
        positions = torch.arange(batch.ids.shape[1])[None] if batch.positions is None else batch.positions
        contexts = contexts_by_kind(self.outside, positions)
        if batch.segments is not None:
            config, visible = self.outside.model.parent_config, _visible(batch.segments)
            dtype = self.outside.lm_head.weight.dtype
            distance_B1TT = (positions[:, :, None] - positions[:, None, :])[:, None]

            @functools.cache
            def within(window: int) -> torch.Tensor:
                mask = (visible & (distance_B1TT < window) if window else visible).to(self.device)
                if config._attn_implementation == "eager":  # it adds its mask to the logits
                    mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
                return mask

            for kind, context in contexts.items():
                context |= {"attention_mask": within(own_window(config, kind)), "narrowed_mask": within}
        return contexts


def _visible(segments_BT: torch.Tensor) -> torch.Tensor:
    """Which tokens see which, (B, 1, T, T).

    A token of padding sees the padding before it and itself, for a row without any would be NaN.
    """
    asking_BT1, asked_B1T = segments_BT[:, :, None], segments_BT[:, None, :]
    length = segments_BT.shape[1]
    same = (asking_BT1 == asked_B1T) | (asked_B1T == 0)
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    return (same & earlier)[:, None]


def layered_parent(parent: Parent, dtype: torch.dtype, device: torch.device) -> LayeredModel:
    """The parent; its blocks come from its bounded cache."""
    return LayeredModel(
        parent.outside(dtype, device), parent.shape.layers, lambda layer: parent.block(layer, dtype, device)
    )


def layered_child(directory: Path, dtype: torch.dtype, device: torch.device) -> LayeredModel:
    """A child in its directory.

    Raises:
        ArtifactError: the tensors are not those that the config asks for.
    """
    config, checkpoint = read_child_config(directory), Checkpoint(directory, ArtifactError)
    checkpoint.check(tensor_shapes(config))

    def block(layer: int) -> PuzzleBlock:
        return load_block(config, checkpoint, layer, dtype, device).requires_grad_(False)

    return LayeredModel(load_outside(config, checkpoint, dtype, device), config.num_hidden_layers, block)
