"""A parent's config.json from the metadata of a GGUF file.

llama.cpp writes the rotary scaling of Llama 3 as one factor per pair of channels (the tensor `rope_freqs.weight`), not
as the settings that the factors follow from. The settings are found again here, and compared with the factors.
Source of names: gguf/constants.py of the `gguf` package.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puzzle_core.errors import ParentError
from puzzle_core.families.config_keys import is_neutral
from puzzle_core.families.family import FAMILIES
from puzzle_core.gguf_import.gguf_metadata import GgufFile

FACTORS = "rope_freqs.weight"


class GgufArchitecture(NamedTuple):
    """A model family under llama.cpp's name.

    `interleaved`: rows of queries and keys are in llama.cpp's order. `one_in_norms`: norms multiply by their weights,
    where transformers' multiply by one more.
    """

    family: str
    interleaved: bool
    one_in_norms: bool = False


ARCHITECTURES = {
    "llama": GgufArchitecture("llama", True),
    "deci": GgufArchitecture("llama", True),
    "mistral": GgufArchitecture("mistral", True),
    "qwen2": GgufArchitecture("qwen2", False),
    "qwen3": GgufArchitecture("qwen3", False),
    "gemma3": GgufArchitecture("gemma3_text", False, one_in_norms=True),
}
"""By `general.architecture`. llama.cpp writes Mistral as `llama`. `deci`, as this project exports, has to have equal
layers."""
_KNOWN_NAMES = """
    block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.layer_norm_rms_epsilon attention.key_length attention.value_length rope.freq_base rope.dimension_count
    rope.scaling.type rope.scaling.factor rope.scaling.finetuned vocab_size
"""
_GEMMA3_NAMES = "attention.sliding_window rope.freq_base_swa"
_GEMMA3_FULL_EVERY, _GEMMA3_LARGEST = 6, 62
"""One layer in so many attends to all tokens. The model of so many layers scales attention by hidden / heads."""
_LLAMA3_BANDS = 1.0, 4.0
"""Low and high frequency factor of every published Llama 3."""


def known_architecture(source: GgufFile) -> GgufArchitecture:
    """The family of a file.

    Raises:
        ParentError: this project has no such family.
    """
    if source.architecture not in ARCHITECTURES:
        raise ParentError(
            f"{source.file} is of architecture {source.architecture!r}, which cannot be imported; known: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[source.architecture]


def gguf_config(source: GgufFile) -> dict[str, Any]:
    """The content of config.json, without the dtype.

    Raises:
        ParentError: metadata is missing, contradicts itself or the tensors, or says what no family here does.
    """
    family = FAMILIES[known_architecture(source).family]
    _refuse_unknown(source)
    hidden, heads = source.size("embedding_length"), source.size("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [f"{family.class_prefix}ForCausalLM"],
        "model_type": family.model_type,
        "vocab_size": _vocabulary(source),
        "hidden_size": hidden,
        "intermediate_size": source.size("feed_forward_length"),
        "num_hidden_layers": source.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.size("attention.head_count_kv") if _has(source, "head_count_kv") else heads,
        "head_dim": _head_dim(source, hidden, heads),
        "hidden_act": "silu",
        "max_position_embeddings": source.size("context_length"),
        "rms_norm_eps": shortest(source.require(f"{source.architecture}.attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "rope_parameters": None,
    }
    config["rope_parameters"] = _rope(source, config["head_dim"])
    for name, tensor in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if name in family.config_keys:
            config[name] = f"blk.0.{tensor}.bias" in source.tensors
    if family.window_key:
        config[family.window_key] = None
    if source.architecture == "gemma3":
        config |= _gemma3(source, config)
        del config["hidden_act"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = source.get(f"tokenizer.ggml.{key}_token_id", int)
    return config


def _gemma3(source: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 has beside a Llama; llama.cpp's graph knows it and files do not say it (src/models/gemma3.cpp)."""
    layers, width = config["num_hidden_layers"], config["head_dim"]
    largest = layers == _GEMMA3_LARGEST
    full = [number % _GEMMA3_FULL_EVERY == 0 for number in range(1, layers + 1)]
    within_window = shortest(source.get(f"{source.architecture}.rope.freq_base_swa", float, 10_000.0))
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if largest else width,
        "sliding_window": source.size("attention.sliding_window"),
        "layer_types": ["full_attention" if attends_to_all else "sliding_attention" for attends_to_all in full],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": within_window},
        },
    }


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _has(source: GgufFile, name: str) -> bool:
    return source.has(f"{source.architecture}.attention.{name}")


def _refuse_unknown(source: GgufFile) -> None:
    """Refuse metadata of the architecture that nothing here reads, unless its value changes nothing."""
    prefix, known = f"{source.architecture}.", _KNOWN_NAMES.split()
    known += _GEMMA3_NAMES.split() if source.architecture == "gemma3" else []
    names = [name for name in source.names if name.startswith(prefix) and name.removeprefix(prefix) not in known]
    unknown = {name: value for name in names if not is_neutral(name, value := source.value(name))}
    if unknown:
        pairs = ", ".join(f"{name} = {value!r:.80}" for name, value in unknown.items())
        raise ParentError(f"{source.file} says what the family has no place for here: {pairs}")


def _vocabulary(source: GgufFile) -> int:
    """Rows of the embedding."""
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ParentError(f"{source.file} has no tensor token_embd.weight")
    rows = int(embedding.shape[-1])
    stated = source.get(f"{source.architecture}.vocab_size", int, rows)
    if stated != rows:
        raise ParentError(f"{source.file}: {source.architecture}.vocab_size is {stated}, the embedding has {rows} rows")
    return rows


def _head_dim(source: GgufFile, hidden: int, heads: int) -> int:
    if not _has(source, "key_length") and hidden % heads:
        raise ParentError(f"{source.file}: the hidden width {hidden} is no multiple of its {heads} heads")
    width = source.size("attention.key_length") if _has(source, "key_length") else hidden // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        full = f"{source.architecture}.{name}"
        if source.has(full) and (size := source.size(name)) != width:
            raise ParentError(f"{source.file}: {full} is {size}, where the head width {width} is expected")
    return width


def _rope(source: GgufFile, head_dim: int) -> dict[str, Any]:
    """Rotary parameters as transformers writes them."""
    prefix = f"{source.architecture}.rope"
    theta = shortest(source.get(f"{prefix}.freq_base", float, 10_000.0))
    kind = source.get(f"{prefix}.scaling.type", str, "none")
    factor = shortest(source.get(f"{prefix}.scaling.factor", float, 1.0))
    if kind not in ("none", "linear"):
        raise ParentError(f"{source.file}: {prefix}.scaling.type is {kind!r}; none and linear can be imported")
    scaling: dict[str, Any] = {"rope_type": "default"}
    if kind == "linear" and factor != 1:
        scaling = {"rope_type": "linear", "factor": factor}
    if FACTORS in source.tensors:
        if scaling["rope_type"] != "default":
            raise ParentError(f"{source.file} has both {prefix}.scaling.type {kind!r} and the tensor {FACTORS}")
        scaling = _scaling_of(source, np.array(source.tensors[FACTORS].data, dtype=np.float32), theta, head_dim)
    return {"rope_theta": theta, **scaling}


def _scaling_of(source: GgufFile, factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """The settings that give these divisors of the frequencies: none, linear, or Llama 3's.

    Raises:
        ParentError: no known settings give them.
    """
    largest = shortest(float(factors.max(initial=0)))
    if factors.shape == (head_dim // 2,) and (factors > 0).all():
        if np.allclose(factors, largest, rtol=1e-6):
            return {"rope_type": "linear", "factor": largest} if largest != 1 else {"rope_type": "default"}
        for original in (2**exponent for exponent in range(3, 24)):
            if np.allclose(factors, llama3_factors(theta, head_dim, largest, original), rtol=1e-5):
                low, high = _LLAMA3_BANDS
                bands = {"low_freq_factor": low, "high_freq_factor": high}
                settings = {"factor": largest, **bands, "original_max_position_embeddings": original}
                return {"rope_type": "llama3", **settings}
    raise ParentError(f"{source.file}: no rotary scaling that is known here gives the factors in its tensor {FACTORS}")


def llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> NDArray[np.float64]:
    """Divisors of the frequencies by Llama 3's rule, one per pair of channels.

    Args:
        theta: base of the frequencies.
        head_dim: channels per head.
        factor: divisor of the lowest frequencies.
        original: context length before the scaling, in tokens.
    """
    low, high = _LLAMA3_BANDS
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors
