"""Writes a child as a DeciLM (Nemotron-NAS) directory, which transformers, vLLM, SGLang and TensorRT-LLM read.

`config.json` describes the layers in `block_configs` (puzzle_core/formats/block_configs.py), and tensors have Llama's
names. The files of deci_remote/ are copied, since no engine registers the model type. A child that the format cannot
hold is refused before any tensor is read.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from puzzle_core.architecture import Architecture, Variant
from puzzle_core.errors import NonFiniteError
from puzzle_core.export import deci_remote
from puzzle_core.export.source import ExportRecord, Source, WrittenTensor, refuse, shared_reasons
from puzzle_core.families.family import FfnNames
from puzzle_core.formats.block_configs import BlockConfig, block_config, to_block_configs
from puzzle_core.formats.decilm_config import published_config
from puzzle_core.model.checkpoint import write_checkpoint
from puzzle_core.model.tokenizer import copy_tokenizer, leave_out, tokenizer_files
from puzzle_core.variants.entries import WIDTH_GRID

Widths = Literal["grid", "pad", "any"]
"""FFN widths that are no multiple of 256 are refused (`grid`), padded with zero channels (`pad`; exact), or written as
`intermediate_size` (`any`), which vLLM and transformers read."""
HfDtype = Literal["float32", "float16", "bfloat16"]

CODE = ("configuration_decilm.py", "modeling_decilm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModel": "modeling_decilm.DeciLMModel",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}
_COPIED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def export_hf(source: Source, out_dir: Path, *, widths: Widths = "grid", dtype: HfDtype | None = None) -> ExportRecord:
    """Write the directory: config, code, tensors, tokenizer and generation config.

    Args:
        out_dir: an empty directory.
        dtype: the type of the written weights; that of the checkpoint if none.

    Raises:
        ExportError: the format cannot hold the child; names every reason.
        NonFiniteError: a weight is too large for `dtype`.
    """
    refuse(source, "a DeciLM directory", refusal_reasons(source, widths))
    weights = getattr(torch, dtype) if dtype else source.dtype
    architecture = padded(source.architecture) if widths == "pad" else source.architecture
    config = _config(source, architecture)
    config["torch_dtype"] = str(weights).removeprefix("torch.")
    tokens = source.unusable_tokens if tokenizer_files(source.directory) else {}
    names = source.family.ffn_names
    counted: Counter[str] = Counter()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for entry in source.tensors():
            tensor = _converted(_widened(entry, architecture, names), weights)
            counted["parameters"] += tensor.numel()
            counted["bytes"] += tensor.numel() * tensor.element_size()
            yield entry.name, tensor

    write_checkpoint(out_dir, tensors())
    (out_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in CODE:
        shutil.copyfile(Path(deci_remote.__path__[0]) / name, out_dir / name)
    copy_tokenizer(source.tokenizer_files, source.directory, out_dir)
    if tokens:
        leave_out(out_dir, tokens)
    return ExportRecord(
        format="DeciLM directory",
        dtype=config["torch_dtype"],
        architecture=architecture,
        parameters=counted["parameters"],
        bytes=counted["bytes"],
        remarks=(*_remarks(source.architecture, architecture), *(source.tokenizer_remarks() if tokens else ())),
    )


def refusal_reasons(source: Source, widths: Widths) -> list[str]:
    """The reasons why this format cannot hold a child; empty if it can."""
    reasons = shared_reasons(source)
    off_grid = {n: str(block.ffn) for n, block in enumerate(source.architecture.layers) if _off_grid(block.ffn)}
    if off_grid and widths == "grid":
        listed = ", ".join(f"layer {layer} {variant}" for layer, variant in off_grid.items())
        reasons.append(
            f"FFN widths must be multiples of {WIDTH_GRID} ({listed}): search with `constraints: {{ffn_multiple_of: "
            f"{WIDTH_GRID}}}`, or export with `--widths pad` (zero channels up to the next multiple) or `--widths any` "
            f"(vLLM and transformers only)"
        )
    if source.shape.hidden % source.shape.heads:
        reasons.append(f"its hidden width {source.shape.hidden} is no multiple of its {source.shape.heads} heads")
    return reasons


def padded(architecture: Architecture) -> Architecture:
    """The architecture with FFN widths rounded up to the grid."""

    def up(variant: Variant) -> Variant:
        return replace(variant, size=-(-variant.size // WIDTH_GRID) * WIDTH_GRID) if _off_grid(variant) else variant

    return Architecture(layers=tuple(b.model_copy(update={"ffn": up(b.ffn)}) for b in architecture.layers))


def _config(source: Source, architecture: Architecture) -> dict[str, Any]:
    """`config.json`, without the dtype."""
    config, shape = source.config, source.shape
    content: dict[str, Any] = {"auto_map": AUTO_MAP, **{name: getattr(config, name, None) for name in _COPIED}}
    content |= {"hidden_act": "silu", "attention_bias": shape.attention_out_bias, "mlp_bias": shape.mlp_bias}
    if shape.qkv_bias != shape.attention_out_bias:
        content["qkv_bias"] = shape.qkv_bias
    if shape.head_dim * shape.heads != shape.hidden:
        content["head_dim"] = shape.head_dim
    return published_config(content | _rope(config.rope_parameters), _block_configs(source, architecture))


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary keys that every reader understands: the older ones where nothing is scaled, else the newer ones."""
    theta = parameters["rope_theta"]
    if parameters.get("rope_type", "default") == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_parameters": dict(parameters)}


def _block_configs(source: Source, architecture: Architecture) -> list[BlockConfig]:
    """Published entries; an FFN width off the grid is written as `intermediate_size` without `ffn_mult`."""
    entries = to_block_configs(padded(architecture), source.shape)
    for block, entry in zip(architecture.layers, entries, strict=True):
        if _off_grid(block.ffn):
            entry["ffn"] = block_config(block)["ffn"]
    return entries


def _off_grid(variant: Variant) -> bool:
    return variant.ffn_width % WIDTH_GRID != 0


def _widened(entry: WrittenTensor, architecture: Architecture, names: FfnNames) -> torch.Tensor:
    """The tensor, padded with zero channels up to its layer's width; these add exactly nothing to the output."""
    tensor = entry.make()
    layer, _, name = entry.name.removeprefix("model.layers.").partition(".")
    axes = {f"{names.path(part)}.{end}": 0 for part in ("gate", "up") for end in ("weight", "bias")}
    axis = (axes | {f"{names.path('down')}.weight": 1}).get(name)
    if axis is None:
        return tensor
    missing = architecture.layers[int(layer)].ffn.size - tensor.shape[axis]
    shape = [missing if dimension == axis else size for dimension, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis) if missing else tensor


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.to(dtype)
    if not torch.isfinite(converted).all():
        raise NonFiniteError(
            f"a weight of {tensor.abs().max():.4g} is not finite in {dtype}: export in bf16 or f32, or make the child "
            f"again"
        )
    return converted


def _remarks(child: Architecture, written: Architecture) -> list[str]:
    pairs = zip(child.layers, written.layers, strict=True)
    return [
        f"layer {layer}: FFN padded with zero channels from {before.ffn.size} to {after.ffn.size}"
        for layer, (before, after) in enumerate(pairs)
        if before != after
    ]
