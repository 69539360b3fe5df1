"""What known families have that no row can describe, named when a parent of theirs is refused."""

from collections.abc import Mapping
from typing import Any

from puzzle_core.families.config_keys import is_neutral

EXPERTS = "mixture-of-experts layers"
_MISSING = {
    "attention and FFN side by side on one input": "cohere cohere2 phi gpt_neox gptj codegen",
    "layers that are neither attention nor FFN": "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 "
    "recurrent_gemma rwkv lfm2 nemotron_h olmo_hybrid",
    "positions that are not rotary": "gpt2 gpt_neo gpt_bigcode opt bloom mpt",
    "norms that subtract the mean": "olmo starcoder2 nemotron stablelm",
    "keys and values from a latent vector": "minicpm3",
    "inputs of its own for every layer": "gemma3n",
    "more inputs than text": "gemma3 mistral3 llama4 qwen2_vl qwen2_5_vl qwen3_vl phi4_multimodal",
}
"""Hugging Face's `model_type`s, by what is missing here."""

MISSING = {model_type: what for what, model_types in _MISSING.items() for model_type in model_types.split()}
"""What is missing, by `model_type`."""


def missing_of(config: Mapping[str, Any]) -> str | None:
    """What a parent with this config.json has that is missing here, as far as it is known."""
    if any("expert" in key and not is_neutral(key, value) for key, value in config.items()):
        return EXPERTS
    return MISSING.get(str(config.get("model_type")))
