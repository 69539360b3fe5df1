"""The configuration of a child: made of its parent's, and read from a child's directory."""

import copy
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ArtifactError
from puzzle_core.families.family import FAMILIES, Family
from puzzle_core.model.remote.configuration_puzzle import PuzzleConfig


def child_config(parent_config: PreTrainedConfig, block_configs: list[dict[str, Any]]) -> PuzzleConfig:
    """The configuration of a child of a parent with this config, which is of a supported family."""
    family = FAMILIES[parent_config.model_type].description()
    config: PuzzleConfig = PuzzleConfig.from_parent(parent_config, block_configs, family)
    return config


def with_layers_of(architecture: Architecture, parent_config: PreTrainedConfig) -> PreTrainedConfig:
    """The parent's configuration with those of its layers alone that a child of this architecture has.

    A block that spans layers is of the kind of the first one: it attends and turns positions as that does.
    """
    kept = list(architecture.options)
    if not architecture.spans:
        return parent_config
    config = copy.deepcopy(parent_config)
    config.num_hidden_layers = len(kept)
    for key in ("layer_types", FAMILIES[parent_config.model_type].rotary_layers_key):
        if key and getattr(parent_config, key, None):
            setattr(config, key, [getattr(parent_config, key)[layer] for layer in kept])
    return config


def read_child_config(directory: Path) -> PuzzleConfig:
    """The configuration in a child's directory.

    A child that was assembled before configurations described their family gets the description of its parent's.

    Raises:
        ArtifactError: the family is described wrongly, or not at all and not supported.
    """
    config: PuzzleConfig = PuzzleConfig.from_pretrained(directory)
    model_type = str((config.parent_config or {}).get("model_type"))
    if config.family is None and model_type not in FAMILIES:
        raise ArtifactError(f"{directory / 'config.json'} describes no family, and {model_type!r} is not supported")
    if config.family is None:
        config.family = FAMILIES[model_type].description()
    try:
        Family.model_validate(config.family | {"config_keys": ()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{directory / 'config.json'} describes its family wrongly ({place}: {first['msg']}): make the child again"
        ) from error
    return config
