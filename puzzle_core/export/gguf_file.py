"""Writes a child as a GGUF file of llama.cpp's architecture `deci`; the file is exact for every variant.

Layers are lowered first (lowering.py). llama.cpp rotates neighbouring channels of queries and keys, transformers
rotates channel i with channel i + d/2, so the rows of these projections are reordered. Rotary scaling that depends on
the channel alone is written as one factor per channel. Norms and biases stay float32. Tensors whose rows are no
multiple of 32, which Q8_0 cannot hold, are float16, as in files that llama.cpp's own tools write.

Legend: H heads, d head width, D hidden width.
"""

from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from puzzle_core.engines import GgufType
from puzzle_core.errors import ExportError, NonFiniteError
from puzzle_core.export.gguf_tokenizer import GgufVocabulary, gguf_vocabulary
from puzzle_core.export.lowering import ZERO_WIDTH, LoweredLayer, PlacedSubblock, biased, lower
from puzzle_core.export.source import ExportRecord, Source, WrittenTensor, refuse, shared_reasons
from puzzle_core.model.remote.modeling_puzzle import family_class

KINDS: dict[GgufType, tuple[Kind, LlamaFileType]] = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
STORED: dict[torch.dtype, GgufType] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ARCHITECTURE = "deci"
_BLOCK_ROW = 32
PROJECTIONS = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"}
FFN_PROJECTIONS = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
"""llama.cpp's names of projections, by the fields of a family's names."""


class _Rotary(NamedTuple):
    """The parent's rotary scaling.

    `factors` divide the unscaled frequencies, one per pair of channels; none where all factors are 1. `scale`
    multiplies cosines and sines, so that attention logits are multiplied by its square.
    """

    factors: NDArray[np.float32] | None
    scale: float


def as_stored(source: Source) -> GgufType:
    """The type of the checkpoint's weights; float32 where GGUF has no such type."""
    return STORED.get(source.dtype, "f32")


def export_gguf(source: Source, file: Path, kind: GgufType, *, name: str = "child") -> ExportRecord:
    """Write one file; tensors are read, converted and written one by one.

    Args:
        name: the model's name in the file's metadata.

    Raises:
        ExportError: the format cannot hold the architecture or the tokenizer; names every reason.
        NonFiniteError: a weight is not finite in this type.
    """
    refuse(source, "GGUF of arch deci", shared_reasons(source))
    layers, rotary = lower(source.architecture, source.shape), _rotary(source)
    vocabulary = gguf_vocabulary(source.tokenizer, source.shape.vocabulary, left_out=source.unusable_tokens)
    tensors = [*_outside(source), *_layer_tensors(source, layers)]
    if rotary.factors is not None:
        factors = torch.from_numpy(rotary.factors)
        tensors.append(WrittenTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    writer = GGUFWriter(file, ARCHITECTURE)
    _describe(writer, source, layers, rotary, name, kind)
    _describe_tokenizer(writer, source.tokenizer, vocabulary)
    kinds = [_kind_of(tensor, kind) for tensor in tensors]
    _write(writer, tensors, kinds)
    return ExportRecord(
        format="GGUF",
        dtype=kind,
        architecture=source.architecture,
        parameters=sum(int(np.prod(t.shape)) for t in tensors),
        bytes=file.stat().st_size,
        remarks=(*_remarks(source, layers, kinds, kind), *source.tokenizer_remarks()),
    )


def _remarks(source: Source, layers: list[LoweredLayer], kinds: list[Kind], kind: GgufType) -> list[str]:
    """Differences from the child: layers that were repacked, and tensors that the type cannot hold."""
    zeros = sum(slot is not None and slot.layer is None for x in layers for slot in (x.attention, x.ffn))
    coarse = kinds.count(Kind.F16) if kind == "q8_0" else 0
    remarks = []
    if zeros or len(layers) != source.shape.layers:
        remarks.append(f"{source.shape.layers} layers lowered to {len(layers)}, of whose subblocks {zeros} are zeros")
    if coarse:
        remarks.append(f"{coarse} tensors in f16, whose rows are no multiple of {_BLOCK_ROW}")
    return remarks


def _describe(
    writer: GGUFWriter, source: Source, layers: list[LoweredLayer], rotary: _Rotary, name: str, kind: GgufType
) -> None:
    shape, config = source.shape, source.config
    writer.add_name(name)
    writer.add_file_type(int(KINDS[kind][1]))
    writer.add_array("puzzle.architecture", [str(block) for block in source.architecture.layers])
    writer.add_block_count(len(layers))
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_head_count([shape.heads if layer.attention else 0 for layer in layers])
    writer.add_head_count_kv([layer.attention.variant.kv_heads if layer.attention else 0 for layer in layers])
    writer.add_feed_forward_length([layer.ffn.variant.ffn_width for layer in layers])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if rotary.scale != 1:
        writer.add_rope_scaling_attn_factors(rotary.scale)


def _describe_tokenizer(writer: GGUFWriter, tokenizer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space)
    else:
        writer.add_tokenizer_pre(vocabulary.pre or "")
        writer.add_token_merges(vocabulary.merges)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None and number < len(vocabulary.tokens):
            add(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if template := tokenizer.chat_template:
        named = (
            [{"name": name, "template": text} for name, text in template.items()]
            if isinstance(template, dict)
            else None
        )
        writer.add_chat_template(named or template)


def _rotary(source: Source) -> _Rotary:
    """The parent's rotary scaling, computed from the frequencies of Hugging Face's own module, whatever its rule."""
    family = source.family.description()
    rotary = family_class(family, "RotaryEmbedding")(config=source.config)
    inverse, width = rotary.inv_freq.double(), source.shape.head_dim
    if 2 * len(inverse) != width:
        raise ExportError(
            f"{source.directory}: rotary positions turn {2 * len(inverse)} of {width} channels; deci turns all"
        )
    channels = torch.arange(0, width, 2, dtype=torch.float64) / width
    factors = source.config.rope_parameters["rope_theta"] ** -channels / inverse
    plain = bool((factors - 1).abs().max() < 1e-5)
    return _Rotary(None if plain else factors.float().numpy(), float(rotary.attention_scaling))


def _outside(source: Source) -> list[WrittenTensor]:
    final_norm = f"model.{source.family.final_norm}.weight"
    names = {"model.embed_tokens.weight": "token_embd.weight", final_norm: "output_norm.weight"}
    names |= {} if source.shape.tied_embeddings else {"lm_head.weight": "output.weight"}
    return [source.tensor(name)._replace(name=written) for name, written in names.items()]


def _layer_tensors(source: Source, layers: list[LoweredLayer]) -> list[WrittenTensor]:
    """All tensors of the lowered layers, under llama.cpp's names."""
    written = []
    for number, layer in enumerate(layers):
        tensors = _attention_tensors(source, layer.attention) if layer.attention else []
        tensors += _ffn_tensors(source, layer)
        written += [tensor._replace(name=f"blk.{number}.{tensor.name}") for tensor in tensors]
    return written


def _attention_tensors(source: Source, subblock: PlacedSubblock) -> list[WrittenTensor]:
    if subblock.layer is None:
        return _zero_attention(source, subblock)
    prefix, family = f"model.layers.{subblock.layer}", source.family
    norms = family.attention_norms if subblock.variant.subblock == "attn" else family.ffn_norms
    tensors = [source.tensor(f"{prefix}.{norms.before}.weight")._replace(name="attn_norm.weight")]
    if subblock.variant.row.linear_bias is not None:
        return [*tensors, source.tensor(f"{_linear(source, subblock)}.weight")._replace(name="attn_output.weight")]
    for part, written in PROJECTIONS.items():
        for end in ("weight", "bias"):
            name = f"{prefix}.{family.attention_names.path(part)}.{end}"
            if name in source.names:
                tensor = source.tensor(name)._replace(name=f"{written}.{end}")
                tensors.append(_interleaved(tensor, source.shape.head_dim) if part in ("query", "key") else tensor)
    return tensors


def _ffn_tensors(source: Source, layer: LoweredLayer) -> list[WrittenTensor]:
    if layer.ffn.layer is None:
        return _zero_ffn(source, layer.attention)
    prefix, family = f"model.layers.{layer.ffn.layer}", source.family
    tensors = [source.tensor(f"{prefix}.{family.ffn_norms.before}.weight")._replace(name="ffn_norm.weight")]
    for part, written in FFN_PROJECTIONS.items():
        for end in ("weight", "bias"):
            name = f"{prefix}.{family.ffn_names.path(part)}.{end}"
            if name in source.names:
                tensors.append(source.tensor(name)._replace(name=f"{written}.{end}"))
    return tensors


def _zero_attention(source: Source, subblock: PlacedSubblock) -> list[WrittenTensor]:
    """A linear layer or an attention of zeros, which adds nothing."""
    shape, hidden = source.shape, source.shape.hidden
    rows, kv_rows = shape.heads * shape.head_dim, subblock.variant.kv_heads * shape.head_dim
    attends = subblock.variant.kv_heads > 0
    tensors = [_filled("attn_norm.weight", (hidden,), 1.0)]
    tensors.append(_filled("attn_output.weight", (hidden, rows if attends else hidden), 0.0))
    if attends:
        sizes = {"attn_q": rows, "attn_k": kv_rows, "attn_v": kv_rows}
        tensors += [_filled(f"{name}.weight", (size, hidden), 0.0) for name, size in sizes.items()]
    return tensors


def _zero_ffn(source: Source, before: PlacedSubblock | None) -> list[WrittenTensor]:
    """An FFN of zeros, which adds nothing, or only the bias of the linear layer in front of it."""
    hidden = source.shape.hidden
    tensors = [_filled("ffn_norm.weight", (hidden,), 1.0), _filled("ffn_gate.weight", (ZERO_WIDTH, hidden), 0.0)]
    tensors += [
        _filled("ffn_up.weight", (ZERO_WIDTH, hidden), 0.0),
        _filled("ffn_down.weight", (hidden, ZERO_WIDTH), 0.0),
    ]
    if before and biased(before, source.shape):
        tensors.append(source.tensor(f"{_linear(source, before)}.bias")._replace(name="ffn_down.bias"))
    return tensors


def _linear(source: Source, subblock: PlacedSubblock) -> str:
    family, attends = source.family, subblock.variant.subblock == "attn"
    part = f"{family.attention_names.module}.linear_attn" if attends else f"{family.ffn_names.module}.linear_mlp"
    return f"model.layers.{subblock.layer}.{part}"


def _filled(name: str, shape: tuple[int, ...], value: float) -> WrittenTensor:
    return WrittenTensor(name, shape, lambda: torch.full(shape, value))


def _interleaved(tensor: WrittenTensor, head_dim: int) -> WrittenTensor:
    """The rows (H*d, ...) of every head in the order 0, d/2, 1, d/2 + 1 and so on."""

    def make() -> torch.Tensor:
        rows = tensor.make()
        heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
        return heads.transpose(1, 2).reshape(rows.shape)

    return tensor._replace(make=make)


def _kind_of(tensor: WrittenTensor, wanted: GgufType) -> Kind:
    if len(tensor.shape) == 1:
        return Kind.F32
    return Kind.F16 if wanted == "q8_0" and tensor.shape[-1] % _BLOCK_ROW else KINDS[wanted][0]


def _write(writer: GGUFWriter, tensors: list[WrittenTensor], kinds: list[Kind]) -> None:
    try:
        for tensor, kind in zip(tensors, kinds, strict=True):
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = int(np.prod(tensor.shape)) // block * block_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_encoded(tensor, kind))
    finally:
        writer.close()


def _encoded(tensor: WrittenTensor, kind: Kind) -> NDArray[Any]:
    values = tensor.make().float().numpy()
    if not np.isfinite(values).all() or (kind == Kind.F16 and np.abs(values).max() > np.finfo(np.float16).max):
        raise NonFiniteError(
            f"tensor {tensor.name!r} has entries that are not finite in {kind.name} (largest "
            f"{np.abs(values).max():.4g}): export in bf16 or f32, or make the child again"
        )
    encoded: NDArray[Any] = gguf.quants.quantize(values, kind)
    return encoded
