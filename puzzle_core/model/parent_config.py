"""A parent's directory (fetched from the hub where needed), its config.json, and the shape that follows from it.

What this project cannot run correctly is refused here by name, before any weight is read.
"""

import contextlib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from puzzle_core.architecture import BlockVariant, ModelShape
from puzzle_core.errors import ParentError, PuzzleError, SpecError, reason
from puzzle_core.families.family import FAMILIES, Family, flag
from puzzle_core.families.missing import missing_of
from puzzle_core.formats.decilm_config import family_config
from puzzle_core.installed_file import local_path
from puzzle_core.model.checkpoint import INDEX, SINGLE
from puzzle_core.model.remote.modeling_puzzle import attention_kinds, own_window
from puzzle_core.model.tokenizer import MORE_TEMPLATES, TOKENIZER_FILES
from puzzle_core.spec import ParentSpec

ADAPTER = "adapter_config.json"
OTHER_FILES = ("config.json", "generation_config.json", ADAPTER, INDEX)
STATE_DEPENDENT_ROPE = {"dynamic", "longrope"}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
DERIVED_SIZES = ("num_key_value_heads", "head_dim")  # transformers has a rule for a missing one


def fetch(spec: ParentSpec) -> Path:
    """The parent's directory; a hub id is downloaded first.

    Raises:
        ParentError: the path is a file, or neither a directory nor a hub id, or the download failed.
        SpecError: the path names a file of a package that is not installed.
    """
    directory = local_path(spec.path)
    if directory.is_dir():
        return directory.resolve()
    if directory.is_file():
        raise ParentError(f"parent.path {spec.path!r} is a file: import it first (`puzzle import gguf FILE --out DIR`)")
    if directory.is_absolute() or spec.path.startswith(".") or spec.path.count("/") != 1:
        raise ParentError(f"parent.path {spec.path!r} is neither a directory here nor a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        wanted = [*OTHER_FILES, *TOKENIZER_FILES, f"{MORE_TEMPLATES}/*.jinja"]
        wanted += ["*.py"] if spec.allow_remote_code else []
        fetched = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=[*wanted, SINGLE]))
        if (fetched / SINGLE).is_file():  # counts before an index and its shards, which may be older
            return fetched
        commit = fetched.name if fetched.parent.name == "snapshots" else spec.revision
        return Path(snapshot_download(spec.path, revision=commit, allow_patterns=[*wanted, *_weight_names(fetched)]))
    except Exception as error:
        raise ParentError(
            f"parent.path {spec.path!r} is no directory here, and the hub did not give it ({reason(error)})"
        ) from error


def _weight_names(directory: Path) -> list[str]:
    """The files of weights that a checkpoint's index names; hubs have the same weights in other files, too."""
    if not (directory / INDEX).is_file():
        return [SINGLE, "model-?????-of-?????.safetensors"]
    shards = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    return sorted(glob.escape(shard) for shard in shards)


class ParentConfig(NamedTuple):
    """The config of a parent's family, and the parent's own block of every layer where its config lists these."""

    config: PreTrainedConfig
    blocks: tuple[BlockVariant, ...]


def read_config(directory: Path) -> ParentConfig:
    """The config of a supported parent: of a family, a child of this project, or a DeciLM (Nemotron-NAS) model.

    Raises:
        ParentError: the config is missing or not valid (names the field), or has a value that is not supported.
    """
    try:
        content = json.loads((directory / "config.json").read_text())
    except FileNotFoundError as error:
        raise ParentError(f"{directory} has no config.json: is it a Hugging Face model directory?") from error
    except ValueError as error:
        raise ParentError(f"{directory / 'config.json'} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ParentError(f"{directory / 'config.json'} is not a JSON object")
    try:
        content, blocks = family_config(content, str(directory / "config.json"))
    except SpecError as error:
        raise ParentError(str(error)) from error
    family = _family_of(content, directory)
    _check_weights_are_whole(content, directory)
    if content.get("quantization_config"):
        raise ParentError(f"{directory} holds quantised weights: give the checkpoint before quantisation")
    _check_sizes(content, directory)
    _check_keys(content, family, directory)
    try:
        if blocks:
            config: PreTrainedConfig = CONFIG_MAPPING[family.model_type].from_dict(content)
        else:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise ParentError(f"{directory / 'config.json'} is not valid: {reason(error)}") from error
    _check_attention_kinds(config, family, directory)
    _check_rope(config.rope_parameters or {}, family, directory)
    return ParentConfig(config, blocks)


def _check_weights_are_whole(content: dict[str, Any], directory: Path) -> None:
    """Refuse a checkpoint whose weights are not those of model.safetensors or of its shards alone."""
    if (directory / ADAPTER).exists():
        raise ParentError(
            f"{directory} holds an adapter ({ADAPTER}), which transformers adds to the weights of its base model: "
            "give a checkpoint that the adapter is merged into (peft's merge_and_unload), or remove the adapter's files"
        )
    if named := content.get("transformers_weights"):
        raise ParentError(
            f"{directory / 'config.json'} names the file of its weights (transformers_weights = {named!r}), which is "
            "not supported: save the model again with transformers' save_pretrained, which writes model.safetensors"
        )


def _family_of(content: dict[str, Any], directory: Path) -> Family:
    """The family of a config.json: its `model_type`, confirmed by the class that wrote the checkpoint."""
    model_type = str(content.get("model_type"))
    if model_type not in FAMILIES:
        missing = missing_of(content)
        raise ParentError(
            f"{directory} is of family {content.get('model_type')!r}, which is not supported"
            + (f", for it has {missing}" if missing else "")
            + f"; supported: {', '.join(sorted(FAMILIES))}"
        )
    family, architectures = FAMILIES[model_type], content.get("architectures")
    if architectures and f"{family.class_prefix}ForCausalLM" not in architectures:
        raise ParentError(
            f"{directory / 'config.json'} says model_type {model_type!r}, but its architectures are {architectures} "
            f"where {family.class_prefix}ForCausalLM is expected: a model of another family gives wrong results here"
        )
    return family


def _check_keys(content: dict[str, Any], family: Family, directory: Path) -> None:
    """Refuse keys that nothing here would read, such as another family's scalars."""
    unknown = family.unknown_keys(content)
    if unknown:
        pairs = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
        raise ParentError(
            f"{directory / 'config.json'} sets what family {family.model_type!r} does not have here: {pairs}. If a key "
            f"changes what the model computes, this parent is not supported; if not, remove the key"
        )


def _check_attention_kinds(config: PreTrainedConfig, family: Family, directory: Path) -> None:
    kinds = attention_kinds(config)
    if unknown := set(kinds) - set(family.attention_kinds):
        raise ParentError(
            f"{directory} uses attention of kind {min(unknown)!r}, which family {family.model_type!r} does not have "
            f"here; it has {', '.join(family.attention_kinds)}"
        )
    window = getattr(config, "sliding_window", None)
    if family.window_key and {"full_attention" if window is None else "sliding_attention"} != set(kinds):
        raise ParentError(
            f"{directory / 'config.json'} says {family.window_key} = {window} and layer_types = {kinds}: family "
            f"{family.model_type!r} has one window for all layers, or none; remove layer_types"
        )
    if "sliding_attention" in kinds and not window:
        raise ParentError(
            f"{directory / 'config.json'} gives layers sliding-window attention by layer_types, and no sliding_window"
        )


def _check_rope(parameters: dict[str, Any], family: Family, directory: Path) -> None:
    """Refuse rotary positions that depend on what was seen, or lack what the family's attention reads."""
    for rope in [by_kind for by_kind in parameters.values() if isinstance(by_kind, dict)] or [parameters]:
        fixed = family.fixed_rope_key is not None and rope.get(family.fixed_rope_key)
        if rope.get("rope_type") in STATE_DEPENDENT_ROPE and not fixed:
            raise ParentError(f"{directory} uses rope type {rope['rope_type']!r}, which is not supported")
        if lacking := [key for key in family.rope_keys if rope.get(key) is None]:
            raise ParentError(
                f"{directory / 'config.json'} is not valid: rope_parameters of family {family.model_type!r} need "
                f"{', '.join(lacking)}"
            )


def _check_sizes(content: dict[str, Any], directory: Path) -> None:
    """Sizes must be in the file, since transformers replaces a missing one by the default of its own class."""
    for name in (*SIZES, *DERIVED_SIZES):
        size = content.get(name)
        if size is None and name in DERIVED_SIZES:
            continue
        if type(size) is not int or size < 1:
            value = repr(size) if name in content else "missing"
            raise ParentError(
                f"{directory / 'config.json'} is not valid: {name!r} is {value}, where a whole number above 0 is "
                f"expected: correct it, or fetch the checkpoint again"
            )


@contextlib.contextmanager
def as_config_says(directory: Path) -> Iterator[None]:
    """Report an error while the config's modules are made (without weights) as an error of the config."""
    try:
        yield
    except PuzzleError:
        raise
    except Exception as error:
        raise ParentError(
            f"{directory / 'config.json'} is not valid: no model can be made as it says "
            f"({type(error).__name__}: {reason(error)})"
        ) from error


def shape_of(config: PreTrainedConfig, directory: Path, blocks: tuple[BlockVariant, ...] = ()) -> ModelShape:
    """The sizes and options of a parent, as all stages use them.

    Args:
        directory: names the parent in messages.
        blocks: the parent's own block of every layer, where these may differ.

    Raises:
        ParentError: the KV heads do not divide the attention heads.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ParentError(f"{directory}: {kv_heads} KV heads do not divide {heads} attention heads")
    family = FAMILIES[config.model_type]
    shape = ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn_width=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=flag(family.qkv_bias, config),
        attention_out_bias=flag(family.attention_out_bias, config),
        mlp_bias=flag(family.mlp_bias, config),
        qk_norm=family.qk_norm,
        max_positions=config.max_position_embeddings,
        qk_norm_whole=family.qk_norm_whole,
        gated=family.ffn_names.gate is not None,
        norms=len(family.attention_norms.names),
        windows=_windows(config),
    )
    return shape.with_blocks(blocks) if blocks else shape


def _windows(config: PreTrainedConfig) -> tuple[int, ...]:
    kinds = attention_kinds(config)
    return tuple(own_window(config, kind) for kind in kinds) if "sliding_attention" in kinds else ()
