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

from puzzle_core.architecture import Architecture
from puzzle_core.formats.block_configs import block_config
from puzzle_core.model.checkpoint import SINGLE
from puzzle_core.model.child_config import child_config
from puzzle_core.model.parent import random_model

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
    blocks: tuple[str, ...] = ()


def _rope(kind: str, **settings: float) -> Pico:
    return Pico(config={"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **settings}})


def _kinds(kinds: str) -> list[str]:
    """`layer_types` by initials: full, sliding."""
    return [{"f": "full_attention", "s": "sliding_attention"}[kind] for kind in kinds]


_BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_ALPHA = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0, "alpha": 50.0}
_BY_POSITION = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
GRANITE_SCALARS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.25,
    "attention_multiplier": 0.5,
    "logits_scaling": 2.0,
}
_WINDOWS = {"sliding_window": 6, "layer_types": _kinds("sfssf")}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 4, "final_logit_softcapping": 2.0, **_WINDOWS}

PICOS = {
    "llama": Pico(),
    "mistral": Pico("mistral", {"sliding_window": None}),
    "qwen2": Pico("qwen2"),
    "qwen3": Pico("qwen3", {"head_dim": 8}),
    "smollm3": Pico("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0]}),
    "seed_oss": Pico("seed_oss", {"head_dim": 16, "attention_bias": False, "attention_out_bias": True}),
    "arcee": Pico("arcee", {"mlp_bias": True}),
    "ernie4_5": Pico("ernie4_5", {"head_dim": 8, "use_bias": True}),
    "exaone4": Pico("exaone4", _WINDOWS),
    "gemma2": Pico("gemma2", {"attn_logit_softcapping": 0.5, **_GEMMA}),
    "gemma3_text": Pico("gemma3_text", {"rope_parameters": _BY_KIND, **_GEMMA}),
    "glm": Pico("glm", {"head_dim": 8}),
    "glm4": Pico("glm4", {"head_dim": 8, "attention_bias": False}),
    "granite": Pico("granite", GRANITE_SCALARS),
    "helium": Pico("helium", {"head_dim": 4, "attention_bias": True}),
    "hunyuan_v1_dense": Pico("hunyuan_v1_dense", {"head_dim": 8, "rope_parameters": _ALPHA}),
    "ministral3": Pico("ministral3", {"head_dim": 8, "rope_parameters": _BY_POSITION}),
    "olmo2": Pico("olmo2", {"attention_bias": True}),
    "olmo3": Pico("olmo3", {"rope_parameters": _BY_KIND, **_WINDOWS}),
    "phi3": Pico("phi3", {"rope_parameters": _PARTIAL}),
    "phi4": Pico("phi3"),
    "mistral-window": Pico("mistral", {"sliding_window": 6}),
    "qwen2-windows": Pico("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
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


BLOCKS = (
    "attn:kv2+ffn:i24",
    "attn:no_op+ffn:i48",
    "attn:linear+ffn:i40",
    "attn:kv4+ffn:linear",
    "attn:no_op+ffn:no_op",
)
_WHOLE = [name for name, pico in PICOS.items() if not pico.saved and "-" not in name]
UNEQUAL = {f"{name}, unequal": PICOS[name]._replace(blocks=BLOCKS) for name in _WHOLE}
"""Parents whose layers differ, one of every family: children of this project with random weights."""


def write_pico(directory: Path, pico: Pico) -> Path:
    """Write this parent to `directory`, by transformers itself, or as a child of this project is stored."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in pico.config}
    config = AutoConfig.for_model(pico.family, **sizes, **pico.config)
    if pico.blocks:
        blocks = [block_config(block) for block in Architecture.parse(pico.blocks).layers]
        model = random_model(child_config(config, blocks))
    else:
        model = AutoModelForCausalLM.from_config(config)
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
