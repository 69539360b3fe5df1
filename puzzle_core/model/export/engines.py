"""Which engines run a child that is exported as a DeciLM directory, and what stops the others. No torch.

llama.cpp is not among them: it reads the GGUF, which carries everything. vLLM's rules were found by running 0.32.0, the
others by reading SGLang 0.5.23's and TensorRT-LLM's sources (docs/engines.md).
"""

from puzzle_core.architecture import Architecture
from puzzle_core.interop.block_configs import WIDTH_GRID


def obstacles(architecture: Architecture) -> dict[str, list[str]]:
    """By engine, why it does not run this architecture; empty lists where it does."""
    blocks = list(enumerate(architecture.layers))
    linear = [f"layer {n} {v}" for n, b in blocks for v in (b.attention, b.ffn) if v.kind == "linear"]
    off_grid = [f"layer {n} {b.ffn}" for n, b in blocks if b.ffn.size % WIDTH_GRID]
    kv_heads = sorted({b.attention.size for _, b in blocks if b.attention.kind == "sized"})
    filled = [(n, b) for n, b in blocks if (b.attention.kind, b.ffn.kind) != ("no_op", "no_op")]
    no_linear = [f"has no linear subblocks ({', '.join(linear)})"] if linear else []
    on_grid = [f"takes FFN widths in steps of {WIDTH_GRID} ({', '.join(off_grid)})"] if off_grid else []
    found: dict[str, list[str]] = {"transformers": [], "vLLM": [*no_linear], "SGLang": [*no_linear, *on_grid]}
    found["TensorRT-LLM"] = [*on_grid]
    if not filled or filled[0][1].attention.kind == "no_op":
        layer = filled[0][0] if filled else 0
        found["vLLM"].append(f"fails where the first layer that is not empty (layer {layer}) has no attention")
    if len(kv_heads) > 1:
        listed = ", ".join(map(str, kv_heads))
        found["SGLang"].append(f"wants one number of KV heads in all layers that attend (here {listed})")
    return found
