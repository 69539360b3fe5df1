"""A child's `config.json` in the published form (DeciLM, Nemotron-NAS), and the architecture that such a file has.

The configuration alone: block_configs beside what the parent's own config.json says. Weights and the Python files that
transformers wants with `trust_remote_code` are no part of it.
"""

from collections.abc import Mapping
from typing import Any

from puzzle_core.architecture import Architecture, ModelShape
from puzzle_core.errors import SpecError
from puzzle_core.formats.block_configs import from_block_configs, to_block_configs
from puzzle_core.formats.foreign_json import Foreign, parse_foreign

PUBLISHED = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
FAMILIES = ("llama", "mistral")
"""Families whose blocks are the published form's: no norms of queries and keys, no biases of queries alone."""


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


def child_config(parent: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The child's `config.json` from its parent's.

    Raises:
        SpecError: the parent is of a family, or the architecture has a variant, that the form cannot carry.
    """
    block_configs = to_block_configs(architecture, _shape(parent))
    kept = {key: value for key, value in parent.items() if key not in ("head_dim", "sliding_window", "layer_types")}
    return kept | PUBLISHED | {"num_key_value_heads": None, "intermediate_size": None, "block_configs": block_configs}


def architecture_of(config: Mapping[str, Any], place: str) -> Architecture:
    """The architecture of a child's `config.json`, of other projects or our own; `place` names it in messages.

    Raises:
        SpecError: a key is missing or wrong, or a block is what no variant of ours is; names the layer and the key.
    """
    found = parse_foreign(_ChildConfig, config, place)
    return from_block_configs(found.block_configs, found.hidden_size, found.num_attention_heads)


def _shape(config: Mapping[str, Any]) -> ModelShape:
    found = parse_foreign(_ParentConfig, config, "the parent's config.json")
    heads, head_dim = found.num_attention_heads, found.head_dim or found.hidden_size // found.num_attention_heads
    if found.model_type not in FAMILIES:
        raise SpecError(f"block_configs carry children of {' and '.join(FAMILIES)}; this is {found.model_type!r}")
    if found.sliding_window is not None:
        raise SpecError(f"block_configs cannot carry a sliding window (sliding_window is {found.sliding_window})")
    if head_dim * heads != found.hidden_size:
        raise SpecError(
            f"block_configs cannot carry a head_dim of {head_dim}: engines take hidden over heads, "
            f"{found.hidden_size} / {heads}"
        )
    return ModelShape(
        family=found.model_type,
        layers=found.num_hidden_layers,
        hidden=found.hidden_size,
        heads=heads,
        kv_heads=found.num_key_value_heads or heads,
        head_dim=head_dim,
        ffn_width=found.intermediate_size,
        vocabulary=found.vocab_size,
        tied_embeddings=found.tie_word_embeddings,
        qkv_bias=found.attention_bias,
        attention_out_bias=found.attention_bias,
        mlp_bias=found.mlp_bias,
        qk_norm=False,
        max_positions=found.max_position_embeddings,
    )
