"""Pico parents: Hugging Face checkpoints of a few thousand random weights, one for every family and option.

Weights are far from transformers' own initial values (ten times as large, norms not at 1, biases not at 0), so that
logits are far from uniform and no part of a block can be left out unseen.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from puzzle_core.model.checkpoint import SINGLE

START = "<s>"
CHARACTERS = [*map(chr, range(33, 127)), "Ċ", "Ġ"]  # printable ASCII, newline and blank as ByteLevel writes them
SIZES: dict[str, Any] = {
    "vocab_size": 1 + len(CHARACTERS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


class Pico(NamedTuple):
    """What sets one pico parent apart."""

    family: str = "llama"
    config: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    dtype: torch.dtype = torch.float32


def _rope(kind: str, **settings: float) -> Pico:
    return Pico(config={"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **settings}})


PICOS = {
    "llama": Pico(),
    "mistral": Pico("mistral", {"sliding_window": None}),
    "qwen2": Pico("qwen2"),
    "qwen3": Pico("qwen3", {"head_dim": 8}),
    "smollm3": Pico("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0]}),
    "seed_oss": Pico("seed_oss", {"head_dim": 16, "attention_bias": False, "attention_out_bias": True}),
    "tied": Pico(config={"tie_word_embeddings": True}),
    "attention-bias": Pico(config={"attention_bias": True}),
    "mlp-bias": Pico(config={"mlp_bias": True}),
    "wide-heads": Pico(config={"head_dim": 16}),
    "rope-llama3": _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "rope-linear": _rope("linear"),
    "rope-yarn": _rope("yarn", original_max_position_embeddings=32),
    "sharded": Pico(saved={"max_shard_size": "20KB"}),
    "bfloat16": Pico(dtype=torch.bfloat16),
}


def write_pico(directory: Path, pico: Pico) -> Path:
    """Write this parent to `directory`, by transformers itself."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in pico.config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(pico.family, **sizes, **pico.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.dim() > 1 else 0.1)
    model.to(pico.dtype).save_pretrained(directory, **pico.saved)
    write_tokenizer(directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Change values in a checkpoint's config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Let `change` change the tensors of a checkpoint of one file, by name."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with one token per character."""
    vocabulary = {token: number for number, token in enumerate([START, *CHARACTERS])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START).save_pretrained(directory)
