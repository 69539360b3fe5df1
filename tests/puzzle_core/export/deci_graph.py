"""llama.cpp's `deci` graph, slow and obvious, on the tensors of a GGUF file: with its faults, and without a cache.

Written from src/models/deci.cpp of llama.cpp; test_llama_cpp.py compares both. Legend: T tokens, D hidden, H heads,
d head width.
"""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch.nn.functional import rms_norm, silu


class DeciGraph:
    """A GGUF file of arch deci, read whole."""

    def __init__(self, file: Path):
        reader = GGUFReader(file)
        self.values = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {t.name: torch.tensor(np.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
        self.head_dim = self.of("attention.key_length")

    def of(self, name):
        """A value of the architecture."""
        return self.values[f"deci.{name}"]

    def logits(self, ids_T):
        """(T, vocabulary)."""
        stream_TD = self.tensors["token_embd.weight"][ids_T]
        heads, kv, widths = (
            self.of(n) for n in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        )
        for layer in range(self.of("block_count")):
            now_TD = stream_TD
            if heads[layer]:
                normed_TD = self._norm(f"blk.{layer}.attn_norm", stream_TD)
                now_TD = self._attend(layer, normed_TD, heads[layer], kv[layer]) if kv[layer] else None
                now_TD = self._linear(f"blk.{layer}.attn_output", normed_TD, bias=False) if now_TD is None else now_TD
            if not widths[layer]:
                continue  # its fault: what attention gave is lost
            if heads[layer]:
                now_TD = now_TD + stream_TD
            normed_TD = self._norm(f"blk.{layer}.ffn_norm", now_TD)
            gate, up = (self._linear(f"blk.{layer}.ffn_{name}", normed_TD) for name in ("gate", "up"))
            assert gate.shape[-1] == widths[layer]
            stream_TD = now_TD + self._linear(f"blk.{layer}.ffn_down", silu(gate) * up)
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self._norm("output_norm", stream_TD) @ head.T

    def _norm(self, name, x):
        return rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.of("attention.layer_norm_rms_epsilon"))

    def _linear(self, name, x, bias=True):
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if bias and f"{name}.bias" in self.tensors else y

    def _attend(self, layer, normed_TD, heads, kv_heads):
        query, key, value = (self._linear(f"blk.{layer}.attn_{n}", normed_TD) for n in "qkv")
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for x in (query, key, value))
        query, key = self._turned(query), self._turned(key)
        key, value = (x.repeat_interleave(heads // kv_heads, 0) for x in (key, value))
        scores_HTT = query @ key.transpose(1, 2) / self.head_dim**0.5
        future = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
        mixed = scores_HTT.masked_fill(future, -torch.inf).softmax(-1) @ value
        return self._linear(f"blk.{layer}.attn_output", mixed.transpose(0, 1).flatten(1))

    def _turned(self, x_HTd):
        """Rotary positions: neighbouring channels are a point that turns."""
        width = self.of("rope.dimension_count")
        rate = self.of("rope.freq_base") ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        rate = rate / self.tensors.get("rope_freqs.weight", torch.ones(width // 2))
        angle = torch.arange(x_HTd.shape[1], dtype=torch.float64)[:, None] * rate
        angle = torch.polar(torch.full_like(angle, self.values.get("deci.rope.scaling.attn_factor", 1.0)), angle)
        points = torch.view_as_complex(x_HTd.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(points * angle).flatten(-2).float()
