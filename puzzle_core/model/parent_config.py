"""What a parent's directory says of itself: fetched from the hub if need be, its config.json checked, its shape.

Everything that this project does not run right is refused here, by name, before any weight is read.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from puzzle_core.architecture import ModelShape
from puzzle_core.errors import ParentError, PuzzleError
from puzzle_core.model.remote.modeling_puzzle import FAMILIES, attention_output_has_bias, family_class
from puzzle_core.spec import ParentSpec

STATE_DEPENDENT_ROPE = {"dynamic", "longrope"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
DERIVED_SIZES = ("num_key_value_heads", "head_dim")  # transformers has a rule for those that are left out


def fetch(spec: ParentSpec) -> Path:
    """The parent's directory, downloaded from the hub unless it is one of this machine.

    Raises:
        ParentError: neither a directory nor a hub id, or the hub did not give it.
    """
    directory = Path(spec.path)
    if directory.is_dir():
        return directory.resolve()
    if directory.is_absolute() or spec.path.startswith(".") or spec.path.count("/") != 1:
        raise ParentError(f"parent.path {spec.path!r} is neither a directory here nor a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", *TOKENIZER_FILES, *(["*.py"] if spec.allow_remote_code else [])]
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=wanted))
    except Exception as error:
        raise ParentError(
            f"parent.path {spec.path!r} is no directory here, and the hub did not give it ({first_line(error)})"
        ) from error


def read_config(directory: Path) -> PreTrainedConfig:
    """The config of a supported parent.

    Raises:
        ParentError: it is missing or not valid (names the field), or asks for what is not supported.
    """
    try:
        content = json.loads((directory / "config.json").read_text())
    except FileNotFoundError as error:
        raise ParentError(f"{directory} has no config.json: is it a Hugging Face model directory?") from error
    except ValueError as error:
        raise ParentError(f"{directory / 'config.json'} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ParentError(f"{directory / 'config.json'} is not a JSON object")
    family = content.get("model_type")
    if str(family) not in FAMILIES:
        raise ParentError(
            f"{directory} is of family {family!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    if content.get("quantization_config"):
        raise ParentError(f"{directory} holds quantised weights: give the checkpoint before quantisation")
    _check_sizes(content, directory)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise ParentError(f"{directory / 'config.json'} is not valid: {first_line(error)}") from error
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (window and family == "mistral"):
        raise ParentError(
            f"{directory} uses sliding-window attention, which is not supported yet"
            + (": set sliding_window to null if its contexts never reach it" if family == "mistral" else "")
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type") in STATE_DEPENDENT_ROPE:
        raise ParentError(f"{directory} uses rope type {rope['rope_type']!r}, which is not supported")
    return config


def _check_sizes(content: dict[str, Any], directory: Path) -> None:
    """Sizes must be written down, since transformers has values of its own for those that are missing."""
    for name in (*SIZES, *DERIVED_SIZES):
        size = content.get(name)
        if size is None and name in DERIVED_SIZES:
            continue
        if type(size) is not int or size < 1:
            found = repr(size) if name in content else "missing"
            raise ParentError(
                f"{directory / 'config.json'} is not valid: {name!r} is {found}, where a whole number above 0 is "
                f"wanted: correct it, or fetch the checkpoint again"
            )


@contextlib.contextmanager
def as_config_says(directory: Path) -> Iterator[None]:
    """Blame the config for what goes wrong while its modules are made, which takes no weights."""
    try:
        yield
    except PuzzleError:
        raise
    except Exception as error:
        raise ParentError(
            f"{directory / 'config.json'} is not valid: no model can be made as it says "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def shape_of(config: PreTrainedConfig, directory: Path) -> ModelShape:
    """The sizes and options that the rest of the project goes by.

    Raises:
        ParentError: the KV heads do not divide the attention heads.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ParentError(f"{directory}: {kv_heads} KV heads do not divide {heads} attention heads")
    with torch.device("meta"):
        attention = family_class(config.model_type, "Attention")(config, 0)
    return ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn_width=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=attention_output_has_bias(config),
        attention_out_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=hasattr(attention, "q_norm"),
        max_positions=config.max_position_embeddings,
    )


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
