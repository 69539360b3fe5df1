"""Blocks with other subblocks than the parent's: built beside the parent, which is never written to.

A block variant runs as two subblocks, an attention and an FFN, each either the parent's own module or a variant's.
Swapping a subblock is choosing another module, so there is nothing to restore.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from puzzle_core.architecture import EMPTY_BLOCK, Option, Variant
from puzzle_core.formats.block_configs import block_config
from puzzle_core.model.parent import Parent, empty_block
from puzzle_core.model.remote.modeling_puzzle import PuzzleBlock
from puzzle_core.state_dict import State

WEIGHTS = "weights.safetensors"
"""The file of a trained variant in the library."""


class Subblocks(NamedTuple):
    """The two subblocks of a block variant, as modules."""

    attention: PuzzleBlock
    ffn: PuzzleBlock

    def attend(self, hidden_BTD: torch.Tensor, **context: object) -> torch.Tensor:
        """The attention, with its residual connection."""
        return self.attention.attend(hidden_BTD, **context)  # type: ignore[no-any-return]

    def feed(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The FFN, with its residual connection."""
        return self.ffn.feed(hidden_BTD)  # type: ignore[no-any-return]

    def __call__(self, hidden_BTD: torch.Tensor, **context: object) -> torch.Tensor:
        """The whole block."""
        return self.feed(self.attend(hidden_BTD, **context))


def variant_block(
    parent: Parent, layer: int, variant: Variant | Option, state: State, dtype: torch.dtype, device: torch.device
) -> PuzzleBlock:
    """A block that holds one subblock variant with the given weights, and nothing in the place of the other.

    Of an option, it holds both halves. It is in evaluation mode, in training too: dropouts of the parent's config would
    add noise that its targets lack.
    """
    config = parent.puzzle_config()
    block_variant = variant.block if isinstance(variant, Option) else EMPTY_BLOCK.with_variant(variant)
    config.block_configs = [block_config(block_variant)] * parent.shape.layers
    block = empty_block(config, layer)
    block.load_state_dict({name: t.to(device=device, dtype=dtype) for name, t in state.items()}, assign=True)
    return block.eval()


def load_weights(directory: Path) -> State:
    """The trained weights of a variant or an option, from its library artifact."""
    return load_file(directory / WEIGHTS)


def load_subblocks(
    parent: Parent,
    layer: int,
    option: Option,
    weights: Mapping[str, State],
    dtype: torch.dtype,
    device: torch.device,
    parent_block: Callable[[], PuzzleBlock] | None = None,
) -> Subblocks:
    """The subblocks of an option, frozen.

    Args:
        weights: what was trained, by its id: the option as a whole, or variants among its subblocks.
        parent_block: gives the parent's own block; by default it comes from the parent's cache.
    """

    def subblock(variant: Variant) -> PuzzleBlock:
        if variant in parent.shape.parent_block(layer).subblocks:
            return parent_block() if parent_block else parent.block(layer, dtype, device)
        state = {} if variant.is_empty else weights[str(variant)]
        return variant_block(parent, layer, variant, state, dtype, device).requires_grad_(False)

    if str(option) in weights:
        whole = variant_block(parent, layer, option, weights[str(option)], dtype, device).requires_grad_(False)
        return Subblocks(whole, whole)
    return Subblocks(subblock(option.block.attention), subblock(option.block.ffn))
