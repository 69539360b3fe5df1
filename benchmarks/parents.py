"""Parents for benchmarks: the project's example parent if it exists, otherwise a random one of the same shape.

Times do not depend on the values of weights and tokens, so random values are sufficient.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from puzzle_core.device import default_device
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec

EXAMPLE = Path(__file__).parent.parent / "deployments/parents/stdlib-2m"


def open_parent(directory: Path | None, place: Path) -> Parent:
    """The parent in `directory`; without one the example parent, or where that is missing a random one of its shape."""
    if directory is None and not (EXAMPLE / "config.json").is_file():
        return random_parent(None, 8, place)
    return Parent(ParentSpec(path=str(directory or EXAMPLE)))


def random_parent(like: Parent | None, layers: int, place: Path) -> Parent:
    """A parent of random weights in `place`, of the shape of `like` or else of the example parent, of any depth."""
    if like:
        config = AutoConfig.from_pretrained(like.directory, num_hidden_layers=layers)
    else:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    config.initializer_range = config.hidden_size**-0.5  # logits far from uniform, so that scores are far from 0
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    directory = place / f"random-{layers}"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return Parent(ParentSpec(path=str(directory)))


def capture(parent: Parent, tokens: int, last_layer: int, place: Path) -> Activations:
    """The parent's states on random tokens, in windows of its context, as float32 up to what leaves `last_layer`."""
    length = min(256, parent.shape.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(parent.shape.vocabulary, (tokens // length, length), generator=generator, dtype=torch.int32)
    activations = Activations(place, parent, ids_NT, torch.float32, default_device())
    activations.capture_embedding()
    for layer in range(last_layer + 1):
        activations.capture_layer(layer)
    return activations
