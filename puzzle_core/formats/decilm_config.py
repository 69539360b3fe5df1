"""A `config.json` whose layers differ: in the published form (DeciLM, Nemotron-NAS), or of this project's children.

export/hf.py writes the published form beside the weights. `decilm_child_config` makes it of the parent's `config.json`
alone. `family_config` reads a config of either form as that of its family, so that such a model can be a parent; code
that travels with it is never run.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape
from puzzle_core.errors import SpecError
from puzzle_core.formats.block_configs import from_block_configs, to_block_configs
from puzzle_core.formats.foreign_json import Foreign, parse_foreign

PUBLISHED = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
DECILM, CHILD = ("nemotron-nas", "deci"), "puzzle"
"""`model_type`s of the published form, the newer and the older one, and of this project's children."""
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


class _OlderConfig(Foreign):
    """The published form before it had `block_configs`: attentions differ in KV heads, and FFNs are alike."""

    num_key_value_heads_per_layer: list[int]
    intermediate_size: int


class FamilyConfig(NamedTuple):
    """The content of a `config.json` as its family has it, and the block of every layer where it lists these."""

    content: dict[str, Any]
    blocks: tuple[BlockVariant, ...]


def family_config(config: Mapping[str, Any], place: str) -> FamilyConfig:
    """A parent's `config.json` of any form as that of its family; one of a family itself comes back as it is.

    Args:
        place: names the file in messages.

    Raises:
        SpecError: a key is missing or wrong, or a block is what no variant of ours is; names the layer and the key.
    """
    model_type = config.get("model_type")
    if model_type == CHILD:
        content = config.get("parent_config")
        if not isinstance(content, Mapping):
            raise SpecError(f"{place} is that of a child, and has no parent_config: make the child again")
        config = {**content, "block_configs": config.get("block_configs")}
    elif model_type in DECILM:
        config = _of_published(config, place)
    else:
        return FamilyConfig(dict(config), ())
    blocks = architecture_of(config, place).layers
    if (layers := config.get("num_hidden_layers")) != len(blocks):
        raise SpecError(f"{place} has num_hidden_layers {layers}, and {len(blocks)} entries in block_configs")
    content = {key: value for key, value in config.items() if key != "block_configs"}
    largest = {
        "num_key_value_heads": max(block.attention.kv_heads for block in blocks),
        "intermediate_size": max(block.ffn.ffn_width for block in blocks),
    }
    missing = {key: size for key, size in largest.items() if size and content.get(key) is None}
    return FamilyConfig(content | missing, blocks)


def _of_published(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The published form with the keys of a Llama, or of Seed-OSS, which tells biases of attention's output apart."""
    family: dict[str, Any] = {"model_type": "llama"}
    if config.get("qkv_bias", config.get("attention_bias")) != config.get("attention_bias"):
        family = {
            "model_type": "seed_oss",
            "attention_bias": config["qkv_bias"],
            "attention_out_bias": config.get("attention_bias", False),
            "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        }
    if "num_key_value_heads_per_layer" in config:
        older = parse_foreign(_OlderConfig, config, place)
        ffn = {"intermediate_size": older.intermediate_size}
        family["block_configs"] = [
            {"attention": {"num_key_value_heads": kv_heads}, "ffn": ffn}
            for kv_heads in older.num_key_value_heads_per_layer
        ]
    dropped = ("architectures", "auto_map", "qkv_bias", "num_key_value_heads_per_layer")
    return {key: value for key, value in config.items() if key not in dropped} | family


def published_config(kept: Mapping[str, Any], block_configs: list[Any]) -> dict[str, Any]:
    """A `config.json` of the published form, which gives the sizes of subblocks in `block_configs` alone.

    Args:
        kept: all keys that do not describe the layers one by one.
        block_configs: one entry per layer.
    """
    sizes = {"num_key_value_heads": None, "intermediate_size": None, "block_configs": block_configs}
    return {**kept, **PUBLISHED, **sizes}


def decilm_child_config(parent: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The child's `config.json`, from its parent's, which may be of the published form itself.

    Raises:
        SpecError: the form cannot describe the parent's family, or a variant of the architecture.
    """
    of_family = family_config(parent, "the parent's config.json")
    block_configs = to_block_configs(architecture, _shape(of_family))
    whole = parent if parent.get("model_type") in DECILM else of_family.content
    dropped = ("head_dim", "sliding_window", "layer_types", "num_key_value_heads_per_layer")
    return published_config({key: value for key, value in whole.items() if key not in dropped}, block_configs)


def architecture_of(config: Mapping[str, Any], place: str) -> Architecture:
    """The architecture of a child's `config.json`, whether other projects or this one wrote it.

    Args:
        place: names the file in messages.

    Raises:
        SpecError: a key is missing or wrong, or a block is what no variant of ours is; names the layer and the key.
    """
    child = parse_foreign(_ChildConfig, config, place)
    return from_block_configs(child.block_configs, child.hidden_size, child.num_attention_heads)


def _shape(config: FamilyConfig) -> ModelShape:
    parent = parse_foreign(_ParentConfig, config.content, "the parent's config.json")
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
    shape = ModelShape(
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
    return shape.with_blocks(config.blocks) if config.blocks else shape
