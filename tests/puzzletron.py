"""A puzzle directory as Model-Optimizer's puzzletron leaves it (its version 1), written by hand from its formats."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, HEADS, HEAD_DIM, VOCABULARY = 4, 512, 16, 32, 1000
KV_HEADS, WIDTHS = (8, 2, None), (1024, 512, None)  # None is a no-op; the first ones are the parent's
BATCH_SIZES, TRAFFICS = (1, 8), ((128, 64), (1024, 256))
BF16 = ("torch.bfloat16",) * 3
PRECISIONS = {("nvfp4",) * 3: 0.5, ("torch.int8",) * 3: 1, ("torch.int8", "torch.int8", "torch.bfloat16"): 1, BF16: 2}
MIB = 2**20
UNUSED = {"replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}


def attention_config(kv_heads: int | None) -> dict[str, Any]:
    """As `dataclasses.asdict` gives an AttentionConfig there."""
    shared = {
        "replace_with_linear": False,
        "sparsify": None,
        "weights_precision": "bf16",
        "llama4": None,
        "mamba": None,
    }
    return {"no_op": kv_heads is None, "num_key_value_heads": kv_heads, **shared}


def ffn_config(width: int | None) -> dict[str, Any]:
    """As `dataclasses.asdict` gives an FFNConfig there."""
    return {"no_op": width is None, "intermediate_size": width, "moe": None, **UNUSED}


def replacement(layers: list[int], kv_heads: int | None, width: int | None) -> dict[str, Any]:
    """One entry of the replacement library."""
    block = {"attention": attention_config(kv_heads), "ffn": ffn_config(width), "parallel_blocks": None}
    halves = [name for name, size in (("attention", kv_heads), ("ffn", width)) if size is not None]
    paths = [f"/ckpts/some/subblocks_safetensors/block_{layers[0]}_{half}.safetensors" for half in halves]
    return {"parent_layer_indices": layers, "child_block_configs": [block], "weight_paths": paths}


@dataclass
class Campaign:
    """What a campaign found: plain numbers to count with, and the files that say the same.

    Attributes:
        kl: KL divergence by layer, KV heads and width; 0 for the parent's own.
        spans: KL divergence of the parent's own block in the place of several layers.
        ms: prefill and decode time by part (("attn", 8), ("ffn", None), "outside"), batch size and prompt length.
    """

    place: Path
    kl: dict[tuple[int, int | None, int | None], float] = field(default_factory=dict)
    spans: dict[tuple[int, ...], float] = field(default_factory=dict)
    ms: dict[tuple[Any, int, int], tuple[float, float]] = field(default_factory=dict)
    timed: bool = True

    def parameters(self, kind: str, size: int | None) -> int:
        """Of one subblock, or of what lies outside the blocks."""
        if kind == "outside":
            return 2 * VOCABULARY * HIDDEN + HIDDEN
        if size is None:
            return 0
        if kind == "ffn":
            return 3 * HIDDEN * size + HIDDEN
        return 2 * HIDDEN * HIDDEN + 2 * HIDDEN * size * HEAD_DIM + HIDDEN

    def kv_bytes(self, kind: str, size: int | None, tokens: int, entry_bytes: float = 2) -> float:
        """KV cache of so many tokens in one attention."""
        return tokens * 2 * (size or 0) * HEAD_DIM * entry_bytes if kind == "attn" else 0

    def write(self) -> Path:
        """All files; returns the directory."""
        own = [replacement([layer], KV_HEADS[0], WIDTHS[0]) for layer in range(LAYERS)]
        others = [replacement([i], kv, width) for (i, kv, width), kl in self.kl.items() if kl]
        others += [replacement(list(layers), KV_HEADS[0], WIDTHS[0]) for layers in self.spans]
        scores = [*(kl for kl in self.kl.values() if kl), *self.spans.values()]
        self.dump("replacement_library.json", own + others)
        self.dump("subblock_stats.json", [self.profile(*key) for key in self.profile_keys()])
        validation = "single_sequence_replacement_solutions--validation"
        self.dump(f"{validation}/teacher.json", {"lm_loss": {"avg": 1.5, "per_sample": [1.4, 1.6]}, "args": {}})
        for number, (entry, kl) in enumerate(zip(others, scores, strict=True)):
            rest = [own[layer] for layer in range(LAYERS) if layer not in entry["parent_layer_indices"]]
            chosen = sorted([entry, *rest], key=lambda each: each["parent_layer_indices"])
            solution = {
                "single_sequence_replacement": entry,
                "chosen_replacements": chosen,
                "block_configs": [block for each in chosen for block in each["child_block_configs"]],
            }
            measures = {"lm_loss": 1.5 + kl / 2, "kl_div": kl, "greedy_teacher_prediction_in_student_top_1": 1 - kl / 9}
            content: dict[str, Any] = {name: {"avg": value, "per_sample": [value]} for name, value in measures.items()}
            content |= {"i_solution": number, "puzzle_solution": solution, "args": {"eval_samples": 8}}
            self.dump(f"{validation}/solution_{number}.json", content)
        return self.place

    def profile_keys(self) -> list[tuple[int, tuple[int, int], tuple[str, ...]]]:
        """Every batch size, traffic and precision."""
        return list(itertools.product(BATCH_SIZES, TRAFFICS, PRECISIONS))

    def profile(self, batch_size: int, traffic: tuple[int, int], precision: tuple[str, ...]) -> dict[str, Any]:
        """One entry of subblock_stats.json."""
        entry_bytes = 2 if precision[2] == "torch.bfloat16" else PRECISIONS[precision]

        def costs(kind: str, size: int | None) -> dict[str, Any]:
            parameters = self.parameters(kind, size)
            cache = self.kv_bytes(kind, size, batch_size * sum(traffic), entry_bytes)
            timed = self.timed and precision == BF16
            key = ("outside" if kind == "outside" else (kind, size), batch_size, traffic[0])
            prefill, decode = self.ms[key] if timed else (None, None)
            found = {
                "runtime_ms": prefill + decode if timed and prefill is not None and decode is not None else None,
                "prefill_runtime_ms": prefill,
                "decode_runtime_ms": decode,
                "memory_mib": (parameters * PRECISIONS[precision] + cache) / MIB,
                "num_params": parameters,
            }
            return (
                found
                if kind == "outside"
                else found | {"kv_cache_memory_mib": cache / MIB, "active_params": parameters}
            )

        subblocks = []
        for layer in range(LAYERS):
            for kind, name, config, sizes in (
                ("attn", "AttentionConfig", attention_config, KV_HEADS),
                ("ffn", "FFNConfig", ffn_config, WIDTHS),
            ):
                for size in sizes:
                    about = {
                        "subblock_config": config(size),
                        "subblock_config_class": name,
                        "parent_layer_index": layer,
                    }
                    subblocks.append(about | costs(kind, size))
        args = {"is_calc_runtime": self.timed, "gpu": "a GPU", "batch_size": batch_size, "prefill_queue_size": 0}
        args |= {"prefill_seq_len": traffic[0], "generation_seq_len": traffic[1], "vocab_size": VOCABULARY}
        args |= {"n_embd": HIDDEN, "n_head": HEADS, "use_cuda_graph": True, "benchmark_iterations": None}
        args |= dict(zip(("weights_dtype", "activations_dtype", "kv_cache_dtype"), precision, strict=True))
        return {"args": args, "non_block": costs("outside", None), "subblocks": subblocks}

    def dump(self, name: str, content: Any) -> None:
        """Write one file."""
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))

    def change(self, name: str, change: Callable[[Any], Any]) -> None:
        """Edit one file; what `change` returns takes the content's place, unless that is None."""
        path = self.place / name
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))


def make_campaign(place: Path) -> Campaign:
    """A campaign with random scores and times, of all pairs in every layer; nothing is written yet."""
    random, found = np.random.default_rng(0), Campaign(place)
    for layer, kv_heads, width in itertools.product(range(LAYERS), KV_HEADS, WIDTHS):
        own = (kv_heads, width) == (KV_HEADS[0], WIDTHS[0])
        found.kl[layer, kv_heads, width] = 0.0 if own else round(float(random.uniform(0.01, 2)), 6)
    parts: list[Any] = ["outside", *(("attn", size) for size in KV_HEADS), *(("ffn", size) for size in WIDTHS)]
    for part, batch_size, (prompt, _) in itertools.product(parts, BATCH_SIZES, TRAFFICS):
        gone = part[1] is None
        prefill, decode = random.uniform(1, 5, 2) * batch_size**0.5 * prompt / 100
        found.ms[part, batch_size, prompt] = (0.0, 0.0) if gone else (float(prefill), float(decode))
    return found
