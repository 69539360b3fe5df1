"""Published throughputs of a 70B parent and its 51B child on H100s, and those of the roofline (METHOD section 8).

The architecture of the 51B is not available, so the 49B of the same family replaces it: 49.87B parameters and
98 KiB of fp8 KV cache per token, against 51.5B and 93 KiB. No factor is fitted: the target is the shipped one, and the
assumptions of docs/targets.md hold for all scenarios alike.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.cost.roofline import roofline
from puzzle_core.quantities import parse_memory
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.sizes import architecture_parameters, kv_entries
from puzzle_core.target import PRECISION_BYTES, TargetSpec, load_target
from puzzle_core.work import Traffic

TARGET = Path(__file__).parents[1] / "deployments/targets/h100-80gb-fp8.yaml"
PARENT_DEVICES, CHILD_DEVICES = 4, 1
MEMORY_SHARE = 0.9
"""Share of the memory that weights and KV cache may take, the rest being activations and the engine's own."""
BATCH_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)


class Published(NamedTuple):
    """One published scenario: generated tokens per second and GPU of the parent on four and the child on one."""

    prompt_tokens: int
    generated_tokens: int
    parent: float
    child: float

    @property
    def ratio(self) -> float:
        """How many times as much the child generates per GPU."""
        return self.child / self.parent


PUBLISHED = (
    Published(128, 128, 2645, 5478),
    Published(128, 1024, 2975, 6472),
    Published(128, 2048, 2786, 4910),
    Published(128, 4096, 1828, 3855),
    Published(2048, 128, 339, 653),
    Published(2048, 2048, 1336, 2622),
)


class Best(NamedTuple):
    """The best batch size and its generated tokens per second and GPU."""

    throughput: float
    batch_size: int


def read_published(config: Path) -> tuple[ModelShape, Architecture]:
    """The parent's shape and the child's architecture from the child's `config.json` (METHOD section 9)."""
    content: dict[str, Any] = json.loads(config.read_text())
    heads, hidden = content["num_attention_heads"], content["hidden_size"]
    layers = tuple(_block(heads, hidden, block) for block in content["block_configs"])
    shape = ModelShape(
        family="llama",
        layers=content["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=hidden // heads,
        ffn_width=28672,
        vocabulary=content["vocab_size"],
        tied_embeddings=content["tie_word_embeddings"],
        qkv_bias=content["attention_bias"],
        attention_out_bias=content["attention_bias"],
        mlp_bias=content["mlp_bias"],
        qk_norm=False,
        max_positions=content["max_position_embeddings"],
    )
    return shape, Architecture(layers=layers)


def _block(heads: int, hidden: int, block: dict[str, dict[str, Any]]) -> BlockVariant:
    attention, width = block["attention"], int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
    return BlockVariant(
        attention=Variant("attn", "no_op")
        if attention["no_op"]
        else Variant("attn", "sized", heads // attention["n_heads_in_group"]),
        ffn=Variant("ffn", "sized", -(-width // 256) * 256),
    )


def best_throughput(
    shape: ModelShape, architecture: Architecture, target: TargetSpec, prompt_tokens: int, generated_tokens: int
) -> Best:
    """The best over batch sizes that fit: sequences come and go, so the cache holds the mean context of each."""
    assert target.hardware, "the roofline needs figures"
    hardware = target.hardware
    memory = MEMORY_SHARE * hardware.tensor_parallel * parse_memory(hardware.memory).value
    free = memory - architecture_parameters(shape, architecture) * PRECISION_BYTES[hardware.weights]
    per_token = kv_entries(shape, architecture, tokens=1) * PRECISION_BYTES[hardware.kv_cache]
    most = int(free // (per_token * (prompt_tokens + generated_tokens / 2)))
    found = []
    for batch_size in {max(1, int(share * most)) for share in BATCH_SHARES}:
        traffic = Traffic(prompt_tokens=prompt_tokens, generated_tokens=generated_tokens, batch_size=batch_size)
        seconds = sum(_times_ms(shape, architecture, target, traffic)) / 1e3
        found.append(Best(batch_size * generated_tokens / seconds / hardware.tensor_parallel, batch_size))
    return max(found)


def _times_ms(shape: ModelShape, architecture: Architecture, target: TargetSpec, traffic: Traffic) -> Iterator[float]:
    """Prefill plus decode of what lies outside, and of all blocks."""
    counts = Counter(variant for block in architecture.layers for variant in block.subblocks)
    costs = roofline(shape, counts, traffic, target)
    yield costs.outside.prefill_ms + costs.outside.decode_ms
    for variant, count in counts.items():
        if not variant.is_empty:
            timing = costs.variants[str(variant)]
            yield count * (timing.prefill_ms + timing.decode_ms)


def on_devices(target: TargetSpec, devices: int) -> TargetSpec:
    """The target with its model shared over some devices."""
    assert target.hardware, "the roofline needs figures"
    return target.model_copy(update={"hardware": target.hardware.model_copy(update={"tensor_parallel": devices})})


def compare(shape: ModelShape, child: Architecture, target: TargetSpec) -> list[tuple[Published, Best, Best]]:
    """Every scenario as published, and the roofline's parent and child."""
    parent, ours = Architecture.of_parent(shape), []
    for row in PUBLISHED:
        tokens = row.prompt_tokens, row.generated_tokens
        best_parent = best_throughput(shape, parent, on_devices(target, PARENT_DEVICES), *tokens)
        best_child = best_throughput(shape, child, on_devices(target, CHILD_DEVICES), *tokens)
        ours.append((row, best_parent, best_child))
    return ours


def comparison_table(compared: list[tuple[Published, Best, Best]]) -> Table:
    """Published against roofline, one row per scenario."""
    rows = []
    for row, parent, child in compared:
        ratio = child.throughput / parent.throughput
        rows.append(
            (
                f"{row.prompt_tokens}/{row.generated_tokens}",
                *(f"{number:,.0f}" for number in (row.parent, parent.throughput, parent.batch_size)),
                *(f"{number:,.0f}" for number in (row.child, child.throughput, child.batch_size)),
                f"{row.ratio:.2f}",
                f"{ratio:.2f}",
                f"{ratio / row.ratio - 1:+.0%}",
            )
        )
    ours = ("roofline", "batch")
    return Table(
        title="Generated tokens per second and H100: 70B parent on four, child on one, fp8",
        columns=(
            "scenario",
            "parent published",
            *ours,
            "child published",
            *ours,
            "ratio published",
            "roofline",
            "error",
        ),
        rows=tuple(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config.json of Llama-3_3-Nemotron-Super-49B-v1")
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    shape, child = read_published(arguments.config)
    sys.stdout.write(format_text(comparison_table(compare(shape, child, load_target(arguments.target)))) + "\n")


if __name__ == "__main__":
    main()
