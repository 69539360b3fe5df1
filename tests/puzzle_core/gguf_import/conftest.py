"""GGUF files of pico parents, as llama.cpp's converter writes them: its names, its order of rows, its types."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from puzzle_core.export.source import Source
from puzzle_core.families.family import FAMILIES
from puzzle_core.gguf_import.gguf_config import ARCHITECTURES
from puzzle_core.gguf_import.gguf_tensors import gguf_name

TOKENS = {"model": "gpt2", "pre": "gpt-2", "tokens": ["<s>", "a", "b", "ab"], "token_type": [3, 1, 1, 1]}
TOKENS |= {"merges": ["a b"], "bos_token_id": 0, "eos_token_id": 0}


def interleaved(rows, head_dim):
    """The rows of every head in llama.cpp's order."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def write_gguf(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a pico parent, by name or by directory, as a GGUF file of an architecture.

    `kind` is the type of matrices; `changes` replaces metadata, and removes those that are none; `tensors` likewise.
    """

    def write(
        name: str | Path,
        architecture: str,
        kind: Kind = Kind.F32,
        changes: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
    ) -> Path:
        source = Source(checkpoint_of(name) if isinstance(name, str) else name)
        shape, config = source.shape, source.config
        values = {
            "block_count": shape.layers,
            "context_length": shape.max_positions,
            "embedding_length": shape.hidden,
            "feed_forward_length": shape.ffn_width,
            "attention.head_count": shape.heads,
            "attention.head_count_kv": shape.kv_heads,
            "attention.key_length": shape.head_dim,
            "attention.value_length": shape.head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]),
        }
        metadata = {f"{architecture}.{key}": value for key, value in values.items()}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in TOKENS.items()} | (changes or {})
        file = tmp_path / f"{architecture}.gguf"
        writer = GGUFWriter(file, architecture)
        for key, value in metadata.items():
            if value is not None:
                writer.add_key_value(key, value, *_types(value))
        known = ARCHITECTURES.get(architecture)
        stored = {}
        for hf_name in source.names:
            array = source.checkpoint.tensor(hf_name).float().numpy()
            if known and known.interleaved and hf_name.split(".")[-2] in ("q_proj", "k_proj"):
                array = interleaved(array, shape.head_dim)
            if known and known.one_in_norms and hf_name.endswith("norm.weight"):
                array = array + 1
            stored[gguf_name(hf_name, FAMILIES[shape.family])] = array
        for tensor, array in (stored | (tensors or {})).items():
            if array is None:
                continue
            stored_kind = kind if array.ndim > 1 and array.shape[-1] % 32 == 0 else Kind.F32
            writer.add_tensor(tensor, gguf.quants.quantize(array, stored_kind), raw_dtype=stored_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return write


def _types(value):
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.get_type(value[0])
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return (kinds.get(type(value), gguf.GGUFValueType.STRING),)
