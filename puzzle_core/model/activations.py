"""Activations of the parent, captured layer after layer into scratch files (METHOD section 3).

`layer-input-i` is what enters layer i, `post-attention-i` what leaves its attention subblock, and `layer-input-(i+1)`
what leaves the layer: the target of every variant of layer i. One layer is in memory at a time, because layer i needs
`layer-input-i` only. Files are raw and memory-mapped, so training reads only the rows of a batch. They are scratch, not
artifacts.

Legend: N windows, T tokens per window, B windows of a batch, D hidden width, V vocabulary.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, Option, Variant
from puzzle_core.errors import StorageError
from puzzle_core.model.parent import Parent, contexts_by_kind
from puzzle_core.model.predictions import Chunk, chunks, from_states
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM, attention_kinds
from puzzle_core.model.surgery import Subblocks, load_subblocks
from puzzle_core.sizes import LARGEST_LOG_PROBABILITIES_BYTES
from puzzle_core.state_dict import State

FORWARD_TOKENS = 4096
LOG_PROBABILITIES = "log-probabilities"


class Activations:
    """The captured states of one set of windows, in a directory that only this class writes."""

    def __init__(
        self,
        directory: Path,
        parent: Parent,
        ids_NT: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        positions_NT: torch.Tensor | None = None,
    ):
        """States of `ids_NT` under `parent`, computed and stored in `dtype`.

        Where `positions_NT` (`puzzle_core.data.read_positions`) start again, attention does not reach back.
        """
        self.directory, self.parent, self.ids_NT, self.dtype, self.device = directory, parent, ids_NT, dtype, device
        self.positions_NT = positions_NT
        windows, tokens = ids_NT.shape
        self._shape = (windows, tokens, parent.shape.hidden)
        self.rows = max(1, FORWARD_TOKENS // tokens)

    def layer_input(self, layer: int) -> torch.Tensor:
        """What enters a layer, mapped, (N, T, D); for `layer == shape.layers` what leaves the last layer."""
        return self._open(layer_input_name(layer))

    def post_attention(self, layer: int) -> torch.Tensor:
        """What leaves the attention subblock of a layer, mapped, (N, T, D)."""
        return self._open(post_attention_name(layer))

    def states(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """These windows of a captured file, read: (B, T, D) in the order of `rows`."""
        return self._open(name)[list(rows)]

    @torch.no_grad()
    def compute(self, rows: Sequence[int], names: Collection[str]) -> dict[str, torch.Tensor]:
        """What `states` reads, computed from the tokens instead: by name, (B, T, D) in the order of `rows`.

        As in a capture, `self.rows` windows go through a layer at a time; a last part of fewer is filled up, since
        products of other sizes may be rounded otherwise.
        """
        size, found = min(self.rows, len(self.ids_NT)), dict[str, torch.Tensor]()
        filled = [*rows, *[rows[0]] * (-len(rows) % size)]
        parts = [filled[first : first + size] for first in range(0, len(filled), size)]
        hidden = [self.outside().model.embed(self.ids_NT[part].long().to(self.device)) for part in parts]
        contexts = [self.contexts(part) for part in parts]

        def keep(name: str, states: list[torch.Tensor]) -> None:
            if name in names:
                found[name] = torch.cat(states)[: len(rows)].to(device="cpu", dtype=self.dtype)

        keep(layer_input_name(0), hidden)
        for layer in range(self.parent.shape.layers):
            if len(found) == len(names):
                break
            block = self.block(layer)
            hidden = [block.attend(states_BTD, **c[layer]) for states_BTD, c in zip(hidden, contexts, strict=True)]
            keep(post_attention_name(layer), hidden)
            hidden = [block.feed(hidden_BTD) for hidden_BTD in hidden]
            keep(layer_input_name(layer + 1), hidden)
        return found

    def block(self, layer: int) -> Subblocks:
        """The block that runs as this layer."""
        parent_block = self.parent.block(layer, self.dtype, self.device)
        return Subblocks(parent_block, parent_block)

    def load_block(self, layer: int) -> Subblocks:
        """The block that runs as this layer, read anew: nothing keeps it but its user."""
        parent_block = self.parent.load_block(layer, self.dtype, self.device)
        return Subblocks(parent_block, parent_block)

    def attention(self, layer: int) -> Variant | None:
        """The attention variant whose output is `post_attention(layer)`; None where only one block has its weights."""
        return self.parent.shape.parent_block(layer).attention

    def has_layer_input(self, layer: int) -> bool:
        """Whether `layer_input(layer)` was captured."""
        return self._path(layer_input_name(layer)).exists()

    @torch.no_grad()
    def capture_embedding(self) -> None:
        """Embed the tokens, which gives `layer-input-0`."""
        outside = self.outside()
        with _Writer(self, layer_input_name(0)) as embedded:
            for rows in self.batches():
                embedded.put(rows, outside.model.embed(self.ids_NT[rows].long().to(self.device)))

    @torch.no_grad()
    def capture_layer(self, layer: int, keep_post_attention: bool = True) -> None:
        """Run one layer on its stored input: `layer-input-(layer+1)` and, if wanted, `post-attention-layer`.

        Raises:
            StorageError: the scratch disk has no room for the states.
        """
        names = [post_attention_name(layer)] * keep_post_attention + [layer_input_name(layer + 1)]
        if all(self._path(name).exists() for name in names):
            return
        block, layer_input = self.block(layer), self.layer_input(layer)
        with ExitStack() as files:
            attended = files.enter_context(_Writer(self, names[0])) if keep_post_attention else None
            layer_output = files.enter_context(_Writer(self, names[-1]))
            for rows in self.batches():
                post_attention_BTD = block.attend(layer_input[rows].to(self.device), **self.contexts(rows)[layer])
                if attended:
                    attended.put(rows, post_attention_BTD)
                layer_output.put(rows, block.feed(post_attention_BTD))

    @torch.no_grad()
    def capture_log_probabilities(self) -> None:
        """Store the parent's next-token log-probabilities if they take at most LARGEST_LOG_PROBABILITIES_BYTES."""
        if self._path(LOG_PROBABILITIES).exists() or self.log_probability_bytes() > LARGEST_LOG_PROBABILITIES_BYTES:
            return
        vocabulary = self.parent.shape.vocabulary
        with _Writer(self, LOG_PROBABILITIES, vocabulary, torch.float32) as stored:
            for rows in self.batches():
                predicted = self.predictions(rows)
                for part in chunks(self.ids_NT[rows].numel(), vocabulary, self.device):
                    stored.put_tokens(rows, part, predicted(part))

    def predictions(self, rows: slice) -> Chunk:
        """The parent's next-token log-probabilities of these windows: read if they are stored, else computed."""
        if self._path(LOG_PROBABILITIES).exists():
            shape = (*self.ids_NT.shape, self.parent.shape.vocabulary)
            stored_NV = _map(self._path(LOG_PROBABILITIES), shape, torch.float32, writable=False)[rows].flatten(0, 1)
            return lambda part: stored_NV[part].to(self.device)
        outside, final_BTD = self.outside(), self.layer_input(self.parent.shape.layers)[rows].to(self.device)
        return from_states(outside, outside.model.normalise(final_BTD))

    def outside(self) -> PuzzleForCausalLM:
        """What lies outside the parent's blocks."""
        return self.parent.outside(self.dtype, self.device)

    def log_probability_bytes(self) -> int:
        """Size of the log-probabilities of all tokens."""
        return self.ids_NT.numel() * self.parent.shape.vocabulary * 4

    def batches(self) -> Iterator[slice]:
        """Row ranges of about FORWARD_TOKENS tokens."""
        for start in range(0, len(self.ids_NT), self.rows):
            yield slice(start, start + self.rows)

    def contexts(self, rows: slice | Sequence[int] = slice(None)) -> list[dict[str, Any]]:
        """By layer, the keyword arguments of `PuzzleBlock.attend` for these windows: positions and mask.

        Without `positions_NT`, all windows have the same.
        """
        if self.positions_NT is None:
            return self._contexts_of_all
        return block_contexts(self.parent, self.positions_NT[rows], self.dtype, self.device)

    @functools.cached_property
    def _contexts_of_all(self) -> list[dict[str, Any]]:
        return block_contexts(self.parent, torch.arange(self.ids_NT.shape[1])[None], self.dtype, self.device)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _open(self, name: str) -> torch.Tensor:
        return _map(self._path(name), self._shape, self.dtype, writable=False)


def drop_layer(directory: Path, layer: int) -> None:
    """Delete the files in a directory of `Activations` that only tasks of this layer read."""
    for name in (layer_input_name(layer), post_attention_name(layer)):
        (directory / f"{name}.bin").unlink(missing_ok=True)


class ChildActivations(Activations):
    """The states of the same windows under a child; log-probabilities are those of the parent."""

    def __init__(
        self,
        directory: Path,
        parents: Activations,
        architecture: Architecture,
        weights: Callable[[int], dict[str, State]],
    ):
        """`weights` gives what was trained of a layer, by the id of a variant or option."""
        super().__init__(directory, parents.parent, parents.ids_NT, parents.dtype, parents.device, parents.positions_NT)
        self._parents, self._architecture, self._weights = parents, architecture, weights
        self._blocks: dict[int, Subblocks] = {}

    def block(self, layer: int) -> Subblocks:
        if layer not in self._blocks:
            self._blocks[layer] = self.load_block(layer)
        return self._blocks[layer]

    def load_block(self, layer: int) -> Subblocks:
        option, weights = self._option(layer), self._weights(layer)
        return load_subblocks(self.parent, layer, option, weights, self.dtype, self.device)

    def attention(self, layer: int) -> Variant | None:
        option = self._option(layer)
        return None if str(option) in self._weights(layer) else option.block.attention

    def _option(self, layer: int) -> Option:
        return self._architecture.options.get(layer, Option(EMPTY_BLOCK))

    def predictions(self, rows: slice) -> Chunk:
        return self._parents.predictions(rows)


def block_contexts(
    parent: Parent, positions_BT: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """By layer, the keyword arguments of `PuzzleBlock.attend` for windows without padding or cache."""
    outside = parent.outside(dtype, device)
    contexts = contexts_by_kind(outside, positions_BT)
    return [contexts[kind] for kind in attention_kinds(outside.model.parent_config)]


def state_bytes(windows: int, tokens: int, hidden: int, dtype: torch.dtype) -> int:
    """Size of one state file."""
    return windows * tokens * hidden * dtype.itemsize


class _Writer:
    """Writes one state file: reserves its space first, and gives the file its name when it is complete."""

    def __init__(self, activations: Activations, name: str, width: int | None = None, dtype: torch.dtype | None = None):
        self._path = activations._path(name)
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        windows, tokens = activations.ids_NT.shape
        self._shape = (windows, tokens, width or activations.parent.shape.hidden)
        self._dtype = dtype or activations.dtype

    def __enter__(self) -> "_Writer":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        size = state_bytes(*self._shape, self._dtype)
        try:
            with self._temporary.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise StorageError(
                f"cannot reserve {size:,} bytes for activations in {self._path.parent} ({error.strerror}): free some "
                f"space, or set runtime.scratch to a larger disk"
            ) from error
        self._mapped = _map(self._temporary, self._shape, self._dtype, writable=True)
        return self

    def put(self, rows: slice, states: torch.Tensor) -> None:
        self._mapped[rows] = states.to(device="cpu", dtype=self._dtype)

    def put_tokens(self, rows: slice, part: slice, values: torch.Tensor) -> None:
        """Write some tokens of these windows, which are counted through all of them."""
        self._mapped[rows].flatten(0, 1)[part] = values.to(device="cpu", dtype=self._dtype)

    def __exit__(self, failed: object, *_: object) -> None:
        del self._mapped
        if failed:
            self._temporary.unlink(missing_ok=True)
        else:
            self._temporary.replace(self._path)


def layer_input_name(layer: int) -> str:
    """Name of the file of what enters a layer."""
    return f"layer-input-{layer:03d}"


def post_attention_name(layer: int) -> str:
    """Name of the file of what leaves a layer's attention subblock."""
    return f"post-attention-{layer:03d}"


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype, writable: bool) -> torch.Tensor:
    size = int(torch.Size(shape).numel())
    return torch.from_file(str(path), shared=writable, size=size, dtype=dtype).view(shape)
