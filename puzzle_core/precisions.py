"""Precisions as data: bits per weight with their scales, and what products of them run in. No imports.

| precision | layout |
|---|---|
| fp8 | E4M3 with a scale per tensor |
| nvfp4 | E2M1, an E4M3 scale per 16 weights (NVIDIA) |
| mxfp4 | E2M1, an E8M0 scale per 32 weights (OCP Microscaling) |
| int4 | weights alone, a 16-bit scale per 128 (AWQ, GPTQ); products run in the activations' precision |
| q4_k_m, q8_0 | files of llama.cpp: bits of a Llama of 8B counted whole, and 8 bits with a 16-bit scale per 32 |
"""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4", "nvfp4", "mxfp4", "q4_k_m", "q8_0"]
Products = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4", "fp4"]


@dataclass(frozen=True)
class Layout:
    """How weights of a precision are stored.

    Attributes:
        bits, scale_bits, group: bits of a weight, and of the scale that `group` weights share.
        products: the peak rate that products of such operands run at.
        embedding_bits: bits per weight of embedding and head, which engines leave at 16 bits in most precisions; of
            the layer itself where it is none.
    """

    bits: float
    products: Products
    scale_bits: float = 0.0
    group: int = 1
    embedding_bits: float | None = None

    @property
    def bytes(self) -> float:
        """Bytes per weight or cache entry, its part of a scale included."""
        return (self.bits + self.scale_bits / self.group) / 8

    @property
    def embedding_bytes(self) -> float:
        """Bytes per weight of embedding and head."""
        return self.bytes if self.embedding_bits is None else self.embedding_bits / 8


LAYOUTS: dict[Precision, Layout] = {
    "float32": Layout(32, "float32"),
    "bfloat16": Layout(16, "bfloat16"),
    "float16": Layout(16, "float16"),
    "fp8": Layout(8, "fp8", embedding_bits=16),
    "int8": Layout(8, "int8", embedding_bits=16),
    "int4": Layout(4, "int4", scale_bits=16, group=128, embedding_bits=16),
    "nvfp4": Layout(4, "fp4", scale_bits=8, group=16, embedding_bits=16),
    "mxfp4": Layout(4, "fp4", scale_bits=8, group=32, embedding_bits=16),
    "q4_k_m": Layout(4.8, "int4", embedding_bits=5.53),
    "q8_0": Layout(8, "int8", scale_bits=16, group=32),
}
