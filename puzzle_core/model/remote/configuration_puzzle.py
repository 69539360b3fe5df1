"""Configuration of a Puzzle child: the parent's configuration, its family, and the sizes of every layer."""

import copy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


class PuzzleConfig(PreTrainedConfig):
    """A parent's configuration plus `block_configs`, one entry per layer, and a description of the parent's family.

    An entry is `{"attention": {"num_key_value_heads", "sliding_window", "no_op", "replace_with_linear"},
    "ffn": {"intermediate_size", "no_op", "replace_with_linear"}}`; a size is null where the subblock has none, and
    the window is there where an attention has one that its layer in the parent lacks. `family` says what Hugging
    Face's classes of the family do not decide: its class names, names of modules, norms, biases and scalars. The
    fields that tools look for (`hidden_size` and so on) repeat the parent's.
    """

    model_type = "puzzle"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    parent_config: dict | None = None
    block_configs: list | None = None
    family: dict | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    max_position_embeddings: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_parent(
        cls, parent: PreTrainedConfig, block_configs: list[dict[str, Any]], family: dict[str, Any]
    ) -> "PuzzleConfig":
        """The configuration of a child of `parent`, which is of this family."""
        names = "vocab_size hidden_size num_attention_heads max_position_embeddings initializer_range"
        names += " pad_token_id bos_token_id eos_token_id tie_word_embeddings"
        plain = {k: v for k, v in parent.to_dict().items() if k not in ("auto_map", "_name_or_path")}
        return cls(
            parent_config=plain,
            block_configs=block_configs,
            family=family,
            num_hidden_layers=len(block_configs),
            **{name: getattr(parent, name) for name in names.split()},
        )

    def parent(self) -> PreTrainedConfig:
        """The parent's configuration as an object, with the attention implementation that its modules use.

        PyTorch's own attention (sdpa) caps no logits, so a parent that caps them attends in plain operations.
        """
        values = {k: v for k, v in self.parent_config.items() if k != "model_type"}
        config = CONFIG_MAPPING[self.parent_config["model_type"]](**values)
        softcap_key = (self.family or {}).get("attention_softcap_key")
        capped = softcap_key is not None and getattr(config, softcap_key) is not None
        implementation = self._attn_implementation
        config._attn_implementation = "eager" if capped and implementation == "sdpa" else implementation
        return config

    def of_layer(self, parent: PreTrainedConfig, layer: int) -> PreTrainedConfig:
        """The parent's configuration with the sizes of one layer."""
        block, config = self.block_configs[layer], copy.copy(parent)
        config.num_key_value_heads = block["attention"]["num_key_value_heads"] or parent.num_key_value_heads
        config.intermediate_size = block["ffn"]["intermediate_size"] or parent.intermediate_size
        return config
