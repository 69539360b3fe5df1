"""A child's `config.json` in the published form (DeciLM, Nemotron-NAS), and the architecture that it describes.

export/hf.py writes such a file beside the weights. `decilm_child_config` makes it of the parent's `config.json` alone.
"""

from collections.abc import Mapping
from typing import Any

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.errors import SpecError
from puzzle_core.formats.block_configs import from_block_configs, to_block_configs
from puzzle_core.formats.foreign_json import Foreign, parse_foreign

PUBLISHED = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
FAMILIES = ("llama", "mistral")
"""Families whose blocks the published form can describe: no norms of queries and keys, no biases of queries alone."""


class _ParentConfig(Foreign):
    model_type: str
    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


class _ChildConfig(Foreign):
    hidden_size: int
    num_attention_heads: int
    block_configs: list[Any]


def published_config(kept: Mapping[str, Any], block_configs: list[Any]) -> dict[str, Any]:
    """A `config.json` of the published form, which gives the sizes of subblocks in `block_configs` alone.

    Args:
        kept: all keys that do not describe the layers one by one.
        block_configs: one entry per layer.
    """
    sizes = {"num_key_value_heads": None, "intermediate_size": None, "block_configs": block_configs}
    return {**kept, **PUBLISHED, **sizes}


def decilm_child_config(parent: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The child's `config.json`, from its parent's.

    Raises:
        SpecError: the form cannot describe the parent's family, or a variant of the architecture.
    """
    block_configs = to_block_configs(architecture, _shape(parent))
    kept = {key: value for key, value in parent.items() if key not in ("head_dim", "sliding_window", "layer_types")}
    return published_config(kept, block_configs)


def architecture_of(config: Mapping[str, Any], place: str) -> Architecture:
    """The architecture of a child's `config.json`, whether other projects or this one wrote it.

    Args:
        place: names the file in messages.

    Raises:
        SpecError: a key is missing or wrong, or a block is what no variant of ours is; names the layer and the key.
    """
    child = parse_foreign(_ChildConfig, config, place)
    return from_block_configs(child.block_configs, child.hidden_size, child.num_attention_heads)


def _shape(config: Mapping[str, Any]) -> ModelShape:
    parent = parse_foreign(_ParentConfig, config, "the parent's config.json")
    heads, head_dim = parent.num_attention_heads, parent.head_dim or parent.hidden_size // parent.num_attention_heads
    if parent.model_type not in FAMILIES:
        raise SpecError(f"block_configs carry children of {' and '.join(FAMILIES)}; this is {parent.model_type!r}")
    if parent.sliding_window is not None:
        raise SpecError(f"block_configs cannot carry a sliding window (sliding_window is {parent.sliding_window})")
    if head_dim * heads != parent.hidden_size:
        raise SpecError(
            f"block_configs cannot carry a head_dim of {head_dim}: engines take hidden over heads, "
            f"{parent.hidden_size} / {heads}"
        )
    return ModelShape(
        family=parent.model_type,
        layers=parent.num_hidden_layers,
        hidden=parent.hidden_size,
        heads=heads,
        kv_heads=parent.num_key_value_heads or heads,
        head_dim=head_dim,
        ffn_width=parent.intermediate_size,
        vocabulary=parent.vocab_size,
        tied_embeddings=parent.tie_word_embeddings,
        qkv_bias=parent.attention_bias,
        attention_out_bias=parent.attention_bias,
        mlp_bias=parent.mlp_bias,
        qk_norm=False,
        max_positions=parent.max_position_embeddings,
    )
