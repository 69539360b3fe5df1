"""The checkpoint that an export reads: of a child, or of a parent, which is exported as the child of all its blocks."""

import json
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ArtifactError, ExportError, reason
from puzzle_core.export.separation import Rows, separated
from puzzle_core.families.family import FAMILIES, Family
from puzzle_core.formats.block_configs import block_config, from_block_configs
from puzzle_core.formats.llama_blocks import unlike_llama
from puzzle_core.model.checkpoint import Checkpoint
from puzzle_core.model.child_config import child_config, read_child_config, with_layers_of
from puzzle_core.model.parent import Parent, tensor_shapes
from puzzle_core.model.parent_config import shape_of
from puzzle_core.model.remote.configuration_puzzle import PuzzleConfig
from puzzle_core.model.tokenizer import open_tokenizer, tokenizer_files, tokens_without_row
from puzzle_core.records import Record
from puzzle_core.spec import ParentSpec


class ExportRecord(Record):
    """The outcome of an export. `architecture` is the written one; `remarks` list its differences from the child's."""

    format: str
    dtype: str
    architecture: Architecture
    parameters: int
    bytes: int
    remarks: tuple[str, ...] = ()


class WrittenTensor(NamedTuple):
    """A tensor to be written: its name, its shape (known before it is read), and the function that makes it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


class Source:
    """An open checkpoint. Opening checks the config and the headers; each tensor is read when it is written."""

    def __init__(self, directory: Path):
        """Open a child's or a parent's directory.

        Raises:
            ArtifactError: the directory holds neither, or its tensors do not match its config.
            ParentError: the directory holds a parent that this project cannot run.
        """
        self.directory = directory.resolve()
        self.config: PreTrainedConfig
        self._open(directory)
        self.shapes = {name: header.shape for name, header in self.checkpoint.headers.items()}

    def _open(self, directory: Path) -> None:
        if _model_type(directory) != PuzzleConfig.model_type:
            parent = Parent(ParentSpec(path=str(self.directory)))
            self.config, self.shape, self.checkpoint = parent.config, parent.shape, parent.checkpoint
            self.architecture = Architecture.of_parent(parent.shape)
            return
        config = read_child_config(directory)
        self.config = config.parent()
        self.shape = shape_of(self.config, directory)
        self.architecture = from_block_configs(config.block_configs, self.shape.hidden, self.shape.heads)
        self.checkpoint = Checkpoint(directory, ArtifactError)
        self.checkpoint.check(tensor_shapes(config))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding's weights."""
        return self.checkpoint.tensor("model.embed_tokens.weight").dtype

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files and the generation config, those that exist."""
        generation = self.directory / "generation_config.json"
        return [*tokenizer_files(self.directory), *([generation] if generation.is_file() else [])]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ExportError: the checkpoint has no tokenizer, or one that is defined by its own code.
        """
        try:
            return open_tokenizer(self.directory)
        except Exception as error:  # what transformers and tokenizers raise has no common base
            raise ExportError(
                f"cannot load the tokenizer of {self.directory} ({type(error).__name__}: {reason(error)}): put the "
                f"parent's tokenizer files there"
            ) from error

    @cached_property
    def unusable_tokens(self) -> dict[str, int]:
        """Added tokens that the embedding has no row for, by their texts; an export leaves them out.

        Raises:
            ExportError: a token of the vocabulary has no row, either.
        """
        tokens = tokens_without_row(self.tokenizer, self.shape.vocabulary)
        if ordinary := tokens.keys() - self.tokenizer.get_added_vocab().keys():
            raise ExportError(
                f"the tokenizer of {self.directory} has {len(tokens):,} tokens beyond the {self.shape.vocabulary:,} "
                f"rows of the embedding, and {min(ordinary)!r} is no added one that could be left out"
            )
        return tokens

    def tokenizer_remarks(self) -> list[str]:
        """What an export leaves out of the tokenizer."""
        tokens = self.unusable_tokens
        if not tokens:
            return []
        listed = ", ".join(f"{text!r} ({number})" for text, number in tokens.items())
        return [f"tokens left out, as the embedding with its {self.shape.vocabulary:,} rows lacks them: {listed}"]

    @cached_property
    def family(self) -> Family:
        """The family, with the names that tensors have here: joint projections are taken apart."""
        return FAMILIES[self.shape.family].separate

    @cached_property
    def _separated(self) -> dict[str, Rows]:
        return separated(self.shapes, self.architecture, self.shape)

    @cached_property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        joint = {rows.name for rows in self._separated.values()}
        return dict.fromkeys([*(name for name in self.shapes if name not in joint), *self._separated])

    def tensors(self) -> Iterator[WrittenTensor]:
        """All tensors, without a head that is tied to the embedding."""
        for name in self.names:
            if name != "lm_head.weight" or not self.shape.tied_embeddings:
                yield self.tensor(name)

    def tensor(self, name: str) -> WrittenTensor:
        """One tensor."""
        if name not in self._separated:
            return WrittenTensor(name, self.shapes[name], lambda: self._make(name))
        stored, start, stop = self._separated[name]
        return WrittenTensor(
            name, (stop - start, *self.shapes[stored][1:]), lambda: self._make(stored)[start:stop].clone()
        )

    def _make(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name)

    def without_rotary(self) -> list[int]:
        """Layers that attend without rotary positions (SmolLM3 has such layers)."""
        key = self.family.rotary_layers_key
        rotary = getattr(self.config, key) if key else [1] * self.shape.layers
        kept = enumerate(block.attention.kv_heads > 0 for block in self.architecture.layers)
        return [layer for layer, attends in kept if attends and not rotary[layer]]


class RandomSource(Source):
    """A checkpoint's config and tokenizer with another architecture and random weights, for measuring speed.

    The weights are made when they are written.
    """

    def __init__(self, like: Path, architecture: Architecture | None = None):
        """Open the checkpoint; the architecture is the parent's if none is given.

        Raises:
            ArtifactError, ParentError: as `Source`.
        """
        super().__init__(like)
        architecture = architecture or Architecture.of_parent(self.shape)
        self.config, self.architecture = with_layers_of(architecture, self.config), architecture.of_child
        self.shape = self.shape.model_copy(update={"layers": len(self.architecture.layers)})
        blocks = [block_config(block) for block in self.architecture.layers]
        self.shapes = tensor_shapes(child_config(self.config, blocks))

    def _make(self, name: str) -> torch.Tensor:
        """Random at every call: norms and biases near 1, matrices scaled to keep the size of states."""
        shape = self.shapes[name]
        scale, middle = (shape[-1] ** -0.5, 0.0) if len(shape) > 1 else (0.1, 1.0)
        return torch.randn(shape) * scale + middle


def refuse(source: Source, form: str, reasons: list[str]) -> None:
    """Raise if there are reasons why this format cannot hold a child.

    Raises:
        ExportError: names every reason.
    """
    if reasons:
        raise ExportError(f"{source.directory} cannot be written as {form}: {'; '.join(reasons)}")


def shared_reasons(source: Source) -> list[str]:
    """The reasons why neither format can hold a child: parts that Llama's block does not have."""
    reasons = unlike_llama(source.shape)
    numbered = enumerate(source.architecture.layers)
    unknown = [f"layer {n} {v}" for n, block in numbered for v in block.subblocks if v.row.published_entry is None]
    if unknown:
        reasons.append(f"the format has no place for {', '.join(unknown)}")
    if (source.config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("its rotary positions turn a part of every head, which the format has no place for")
    if layers := source.without_rotary():
        reasons.append(f"layers {layers} attend without rotary positions, which the format cannot describe")
    activation = getattr(source.config, "hidden_act", None) or source.config.hidden_activation
    if activation not in ("silu", "swish"):
        reasons.append(f"its FFN's activation is {activation!r}, where engines take silu")
    return reasons


def _model_type(directory: Path) -> str | None:
    try:
        content = json.loads((directory / "config.json").read_text())
        return str(content["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{directory} holds no checkpoint of a child ({type(error).__name__}: {error}): give the directory of one, "
            f"or its key with --store"
        ) from error
