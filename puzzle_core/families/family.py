"""What sets a model family apart: one YAML file per Hugging Face `model_type`, read into a `Family`.

Every family is a decoder whose layers have an attention and an FFN, built from Hugging Face's own attention, FFN, norm
and rotary classes. A file describes what these classes do not decide (names of modules, projections and norms, where
norms stand, biases, scalars, what happens to logits), which attention kinds layers may have, which keys of a
`config.json` are understood, and what of the classes a format made for Llama cannot hold.

A child's `config.json` carries the description of its family, since the modelling code of a child imports nothing
from here. CONTRIBUTING.md says how to add a family.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from puzzle_core.families.config_keys import COMMON_KEYS, is_neutral
from puzzle_core.records import Record
from puzzle_core.yaml_file import parse_record, read_keys

Flag = bool | str
"""True, False, or the config key whose value it is."""


class SubblockNames(Record):
    """Names in the checkpoint: of a subblock's module within a layer, and of parts within the module."""

    module: str

    def path(self, part: str) -> str:
        """The name within a layer of a part, which is one of the fields: `self_attn.q_proj` for `query`."""
        return f"{self.module}.{getattr(self, part)}"


class AttentionNames(SubblockNames):
    """Names of an attention, its projections and its norms of queries and keys; Llama's by default.

    Parts of one name are one projection, whose rows are those of query, key and value in this order.
    """

    JOINABLE: ClassVar = ("query", "key", "value")

    module: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"


class FfnNames(SubblockNames):
    """Names of an FFN and its projections; Llama's by default.

    An FFN without a gate has none under `gate`. Gate and up of one name are one projection, with the rows of the gate
    first.
    """

    JOINABLE: ClassVar = ("gate", "up")

    module: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def wide(self) -> tuple[str, ...]:
        """The parts whose rows are the FFN's channels."""
        return self.JOINABLE if self.gate else ("up",)


class SubblockNorms(Record):
    """Names of the norms of one subblock; without a name there is no norm."""

    before: str | None = Field(default=None, description="normalises the input of the subblock")
    after: str | None = Field(default=None, description="normalises the output, before the residual is added")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are given."""
        return tuple(name for name in (self.before, self.after) if name)


class Family(Record):
    """One model family. Fields that end in `_key` name a key of the parent's config.json."""

    model_type: str = Field(description="Hugging Face's name of the family, and the name of the file")
    module: str | None = Field(
        default=None,
        description="Hugging Face's folder of the classes, where it is not the model_type",
        exclude_if=lambda module: module is None,
    )
    class_prefix: str = Field(description="start of Hugging Face's class names: Llama in LlamaAttention")
    attention_names: AttentionNames = AttentionNames()
    ffn_names: FfnNames = FfnNames()
    attention_norms: SubblockNorms
    ffn_norms: SubblockNorms
    final_norm: str = Field(default="norm", description="name of the norm before the head, within the model")
    qk_norm: bool = Field(description="attention normalises queries and keys")
    qk_norm_whole: bool = Field(default=False, description="over all heads together, not each head by itself")
    qkv_bias: Flag = Field(description="query, key and value projections have biases")
    attention_out_bias: Flag = Field(description="the output projection of attention has a bias")
    mlp_bias: Flag = Field(description="the projections of the FFN have biases")
    attention_kinds: tuple[str, ...] = Field(
        default=("full_attention",), description="values of layer_types that layers may have"
    )
    window_key: str | None = Field(
        default=None, description="a value there gives every layer a sliding window, without layer_types"
    )
    rotary_pairs: bool = Field(
        default=False,
        description="rotary positions turn channels 2i and 2i + 1 together, Llama's i and i + d/2",
    )
    rope_keys: tuple[str, ...] = Field(default=(), description="keys of rope_parameters that attention itself reads")
    fixed_rope_key: str | None = Field(
        default=None, description="with this key in rope_parameters, rotary positions of type dynamic are fixed ones"
    )
    rotary_layers_key: str | None = Field(default=None, description="per layer 1 (rotary positions) or 0 (none)")
    embedding_scale_key: str | None = Field(default=None, description="embeddings are multiplied by it")
    embedding_sqrt_hidden: bool = Field(
        default=False, description="embeddings are multiplied by the root of hidden_size, rounded to their dtype"
    )
    residual_scale_key: str | None = Field(default=None, description="the output of a subblock is multiplied by it")
    logits_divisor_key: str | None = Field(default=None, description="logits are divided by it")
    attention_softcap_key: str | None = Field(
        default=None,
        description="logits of attention become cap * tanh(logits / cap)",
        exclude_if=lambda key: key is None,
    )
    logits_softcap_key: str | None = Field(default=None, description="logits become cap * tanh(logits / cap)")
    config_keys: tuple[str, ...] = Field(
        description="config keys, beside those of every family, that Hugging Face's own classes or this row read, or "
        "that change nothing when a parent runs"
    )

    @property
    def attention_prefixes(self) -> tuple[str, ...]:
        """How names of an attention subblock's tensors start, within a layer."""
        return (f"{self.attention_names.module}.", *(f"{name}." for name in self.attention_norms.names))

    @property
    def ffn_prefixes(self) -> tuple[str, ...]:
        """How names of an FFN subblock's tensors start, within a layer."""
        return (f"{self.ffn_names.module}.", *(f"{name}." for name in self.ffn_norms.names))

    @property
    def separate(self) -> Self:
        """This family with the parts of joint projections by themselves, under Llama's names."""
        names: dict[str, SubblockNames] = {}
        for field in ("attention_names", "ffn_names"):
            own = getattr(self, field)
            paths = [getattr(own, part) for part in own.JOINABLE]
            joint = {part for part in own.JOINABLE if paths.count(getattr(own, part)) > 1}
            names[field] = own.model_copy(update={part: getattr(type(own)(), part) for part in joint})
        return self.model_copy(update=names)

    @property
    def unlike_llama(self) -> list[str]:
        """Fields of names, norms, rotary positions and scalars unlike Llama's: a format made for Llamas lacks them."""
        fields = (
            "attention_names",
            "ffn_names",
            "final_norm",
            "attention_norms",
            "ffn_norms",
            "rotary_pairs",
            "rope_keys",
            "embedding_scale_key",
            "embedding_sqrt_hidden",
            "residual_scale_key",
            "attention_softcap_key",
            "logits_divisor_key",
            "logits_softcap_key",
        )
        return [field for field in fields if getattr(self.separate, field) != getattr(FAMILIES["llama"], field)]

    def description(self) -> dict[str, Any]:
        """The family as a child's config.json carries it: plain values, without what only opening a parent needs."""
        return self.model_dump(mode="json", exclude=_OF_PARENTS)

    def unknown_keys(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a config.json that this row does not know and that are not at a neutral value."""
        known = {*COMMON_KEYS, *self.config_keys}
        return {key: value for key, value in config.items() if key not in known and not is_neutral(key, value)}


_OF_PARENTS = {
    "qk_norm_whole",
    "attention_kinds",
    "window_key",
    "rotary_pairs",
    "rope_keys",
    "fixed_rope_key",
    "config_keys",
}
"""Fields that checks, sizes and exports read, and the modelling code of a child does not."""


def flag(value: Flag, config: Any) -> bool:
    """A flag of a family for one parent's config."""
    return bool(getattr(config, value, False)) if isinstance(value, str) else value


def _read_families() -> dict[str, Family]:
    hint = "it starts with model_type"
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {f.stem: parse_record(Family, read_keys(f, "family", hint), str(f), "family") for f in files}


FAMILIES = _read_families()
"""The supported families by `model_type`."""
