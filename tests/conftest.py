"""Pico parents, their tokens and activations, shared by all tests."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from tests.pico import PICOS, SIZES, write_pico

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a pico parent by name; shared, so copy it before changing it."""
    return functools.cache(lambda name: write_pico(tmp_path_factory.mktemp(name), PICOS[name]))


@pytest.fixture(scope="session")
def parent_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Parent]:
    """A pico parent by name, opened; shared, since nothing ever writes to a parent."""
    return functools.cache(lambda name: Parent(ParentSpec(path=str(checkpoint_of(name)))))


@pytest.fixture
def parent(parent_of: Callable[[str], Parent]) -> Parent:
    """The plain one: Llama, untied, no biases."""
    return parent_of("llama")


@pytest.fixture(scope="session")
def ids_NT() -> torch.Tensor:
    """Six windows of sixteen tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SIZES["vocab_size"], (6, 16), generator=generator, dtype=torch.int32)


@pytest.fixture
def tokens_dir(tmp_path: Path, ids_NT: torch.Tensor) -> Path:
    """`ids_NT` as a tokens artifact."""
    directory = tmp_path / "tokens"
    directory.mkdir()
    save_file({"tokens": ids_NT}, directory / "tokens.safetensors")
    return directory


@pytest.fixture(scope="session")
def activations_of(
    parent_of: Callable[[str], Parent], ids_NT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Activations]:
    """The captured states of a pico parent by name, all layers of them."""

    @functools.cache
    def capture(name: str) -> Activations:
        activations = Activations(tmp_path_factory.mktemp("states"), parent_of(name), ids_NT, torch.float32, CPU)
        activations.capture_embedding()
        for layer in range(activations.parent.shape.layers):
            activations.capture_layer(layer)
        return activations

    return capture
