"""Configuration of a DeciLM model: a Llama whose layers differ, described by `block_configs`.

An entry is `{"attention": {"n_heads_in_group", "no_op", "replace_with_linear"}, "ffn": {"ffn_mult", "no_op",
"replace_with_linear"}}`. Engines read entries by attribute, so they are dicts that allow that. An FFN's width is
`int(2 * ffn_mult * hidden_size / 3)` rounded up to a multiple of 256, or its `intermediate_size` where it has no
`ffn_mult`.
"""

import transformers
from transformers import LlamaConfig

WIDTH_GRID = 256


class AttributeDict(dict):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama's configuration and one entry of `block_configs` per layer.

    `qkv_bias` is there only where it differs from `attention_bias`, which otherwise holds for the output too.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        entries = [
            AttributeDict({subblock: AttributeDict(sizes) for subblock, sizes in entry.items()})
            for entry in block_configs or []
        ]
        for name in ("num_key_value_heads", "intermediate_size"):  # null in the file: layers have their own
            if kwargs.get(name, 0) is None:
                del kwargs[name]
        rope = kwargs.get("rope_parameters")
        if rope and transformers.__version__.startswith("4."):  # which knows scaling by its old name only
            kwargs["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        super().__init__(**kwargs)
        self.block_configs = entries

    def kv_heads(self, layer):
        """KV heads of a layer's attention; none where it has no attention."""
        group = self.block_configs[layer].attention.n_heads_in_group
        return group and self.num_attention_heads // group

    def ffn_width(self, layer):
        """Width of a layer's FFN; none where it has no FFN of its own."""
        ffn = self.block_configs[layer].ffn
        if ffn.get("ffn_mult") is None:
            return ffn.get("intermediate_size")
        return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // WIDTH_GRID) * WIDTH_GRID
