"""The tensors of a GGUF file under Hugging Face's names, un-permuted and dequantised, one at a time.

llama.cpp rotates neighbouring channels of queries and keys, transformers rotates channel i with channel i + d/2. So
the rows of these projections are in another order in files of some architectures.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import ReaderTensor
from gguf.quants import dequantize

from puzzle_core.errors import ParentError
from puzzle_core.export.gguf_file import FFN_PROJECTIONS, PROJECTIONS
from puzzle_core.families.family import FAMILIES, Family
from puzzle_core.gguf_import.gguf_config import FACTORS, known_architecture
from puzzle_core.gguf_import.gguf_metadata import GgufFile
from puzzle_core.model.tensor_stream import StreamedTensor

FLOATS = {Kind.F64: torch.float64, Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_INTEGERS = {Kind.I8, Kind.I16, Kind.I32, Kind.I64}
_ATTENTION = {**PROJECTIONS, "query_norm": "attn_q_norm", "key_norm": "attn_k_norm"}


def imported_tensors(source: GgufFile, expected: dict[str, tuple[int, ...]], head_dim: int) -> list[StreamedTensor]:
    """All tensors of a parent in the order of `expected`; float types are kept, quantised ones become float32.

    Args:
        source: the file.
        expected: shapes by Hugging Face's names, from the config.
        head_dim: channels per head.

    Raises:
        ParentError: the file lacks a tensor, holds others, or has another shape or type.
    """
    family = FAMILIES[known_architecture(source).family]
    names = {gguf_name(name, family): name for name in expected}
    missing = sorted(names.keys() - source.tensors.keys())
    others = sorted(source.tensors.keys() - names.keys() - {FACTORS})
    for unmatched, what in (
        (missing, "lacks {} tensors of its architecture"),
        (others, "holds {} tensors of no place here"),
    ):
        if unmatched:
            raise ParentError(
                f"{source.file} {what.format(len(unmatched))}, the first being {unmatched[0]!r}: convert the model "
                "again, or fetch another file"
            )
    return [_imported(source, source.tensors[part], name, expected[name], head_dim) for part, name in names.items()]


def gguf_name(name: str, family: Family) -> str:
    """llama.cpp's name of a tensor: `blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        names = {family.attention_norms.before: "attn_norm", family.ffn_norms.before: "ffn_norm"}
        names |= {family.attention_norms.after: "post_attention_norm", family.ffn_norms.after: "post_ffw_norm"}
        names |= {family.attention_names.path(field): name for field, name in _ATTENTION.items()}
        names |= {family.ffn_names.path(field): name for field, name in FFN_PROJECTIONS.items()}
        return f"blk.{layer}.{names[part]}.{end}"
    outside = {"model.embed_tokens": "token_embd", f"model.{family.final_norm}": "output_norm", "lm_head": "output"}
    return f"{outside[stem]}.{end}"


def _imported(
    source: GgufFile, tensor: ReaderTensor, name: str, shape: tuple[int, ...], head_dim: int
) -> StreamedTensor:
    stored = tuple(int(size) for size in reversed(tensor.shape))
    if stored != shape:
        raise ParentError(f"{source.file}: tensor {tensor.name!r} has shape {stored}, its metadata ask for {shape}")
    if tensor.tensor_type in _INTEGERS:
        raise ParentError(f"{source.file}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}, no weight")
    architecture = known_architecture(source)
    names = FAMILIES[architecture.family].attention_names
    turned = architecture.interleaved and (names.path("query") in name or names.path("key") in name)

    def make() -> torch.Tensor:
        values = _values(source, tensor).reshape(shape)
        values = values - 1 if architecture.one_in_norms and name.endswith("norm.weight") else values
        return halves(values, head_dim) if turned else values

    return StreamedTensor(name, shape, FLOATS.get(tensor.tensor_type, torch.float32), make)


def halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows (H*d, ...) of every head, of which those in the order 0, d/2, 1, d/2 + 1 and so on are given."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _values(source: GgufFile, tensor: ReaderTensor) -> torch.Tensor:
    """The values of a tensor as one row, in memory of its own."""
    kind = tensor.tensor_type
    if kind in FLOATS:
        return torch.from_numpy(np.array(tensor.data).reshape(-1).view(np.uint8)).view(FLOATS[kind])
    try:
        return torch.from_numpy(np.ascontiguousarray(dequantize(tensor.data, kind), dtype=np.float32).reshape(-1))
    except (NotImplementedError, KeyError) as error:
        raise ParentError(
            f"{source.file}: tensor {tensor.name!r} is of type {kind.name}, which the gguf package cannot dequantise"
        ) from error
