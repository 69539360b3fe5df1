"""From tables to a problem: join scores and costs over every layer's variants and turn limits into capacities.

Everything outside the blocks is taken off each limit first (METHOD section 5); what is missing is an error that names
the layer and the variant (DESIGN rule 5). No torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape
from puzzle_core.cost.analytic import DTYPE_BYTES, outside_parameters, variant_size
from puzzle_core.errors import CoverageError, InfeasibleError
from puzzle_core.quantities import Quantity, parse_bytes, parse_seconds, parse_share, parse_throughput
from puzzle_core.search.problem import Column, Limit, Problem
from puzzle_core.spec import LimitsSpec, ScenarioSpec, VariantsSpec
from puzzle_core.stages import CostRecord, LimitUse, Prediction, ScoreRecord

RESOURCES = ("parameter_bytes", "memory_bytes", "prefill_ms", "decode_ms", "total_ms")
OBJECTIVES: dict[str, Callable[[ScoreRecord], float]] = {
    "kl": lambda score: score.kl_nats_per_token,
    "lm_loss": lambda score: score.lm_loss_increase_nats_per_token,
    "disagreement": lambda score: 1 - score.top1_agreement,
}


@dataclass(frozen=True)
class Costs:
    """Costs of one scenario at one batch size: of blocks, and of everything outside them."""

    shape: ModelShape
    scenario: ScenarioSpec
    batch_size: int
    measured: CostRecord
    dtype_bytes: int

    def of_block(self, layer: int, block: BlockVariant) -> dict[str, float]:
        """All resources of one block variant.

        Raises:
            CoverageError: a half of it has no measured cost.
        """
        times = {"prefill_ms": 0.0, "decode_ms": 0.0}
        parameters = kv_entries = 0
        for half in (block.attention, block.ffn):
            size = variant_size(self.shape, half)
            parameters, kv_entries = parameters + size.parameters, kv_entries + size.kv_entries_per_token
            if half.kind == "no_op":
                continue
            if str(half) not in self.measured.variants:
                raise CoverageError(f"layer {layer} {block}: no measured cost of {half} at batch {self.batch_size}")
            timing = self.measured.variants[str(half)]
            times["prefill_ms"] += timing.prefill_ms
            times["decode_ms"] += timing.decode_ms
        return self._resources(parameters, kv_entries, **times)

    def outside(self) -> dict[str, float]:
        """All resources of what lies outside the blocks."""
        timing = self.measured.outside
        return self._resources(outside_parameters(self.shape), 0, timing.prefill_ms, timing.decode_ms)

    def predict(self, architecture: Architecture) -> Prediction:
        """Costs of a whole child."""
        rows = [self.of_block(layer, block) for layer, block in enumerate(architecture.layers)] + [self.outside()]
        total = {name: sum(row[name] for row in rows) for name in RESOURCES}
        return Prediction(
            batch_size=self.batch_size,
            parameters=round(total["parameter_bytes"]) // self.dtype_bytes,
            memory_bytes=total["memory_bytes"],
            prefill_ms=total["prefill_ms"],
            decode_ms=total["decode_ms"],
        )

    def _resources(self, parameters: int, kv_entries: int, prefill_ms: float, decode_ms: float) -> dict[str, float]:
        tokens = self.batch_size * (self.scenario.prompt_tokens + self.scenario.generated_tokens)
        parameter_bytes = parameters * self.dtype_bytes
        return {
            "parameter_bytes": parameter_bytes,
            "memory_bytes": parameter_bytes + tokens * kv_entries * self.dtype_bytes,
            "prefill_ms": prefill_ms,
            "decode_ms": decode_ms,
            "total_ms": prefill_ms + decode_ms,
        }


def make_costs(shape: ModelShape, scenario: ScenarioSpec, batch_size: int, measured: CostRecord, dtype: str) -> Costs:
    """The costs of a scenario at one batch size, for models served in `dtype`."""
    return Costs(shape, scenario, batch_size, measured, DTYPE_BYTES[dtype])


def build_problem(variants: VariantsSpec, scores: Mapping[tuple[int, BlockVariant], float], costs: Costs) -> Problem:
    """The problem of one batch size, with the scenario's limits.

    Args:
        scores: of every layer and block variant but the parent's own.

    Raises:
        CoverageError: a block variant of the space has no score or no cost.
    """
    shape = costs.shape
    blocks = [variants.blocks_of_layer(layer, shape) for layer in range(shape.layers)]
    score: list[np.ndarray] = []
    resources: dict[str, list[np.ndarray]] = {name: [] for name in RESOURCES}
    for layer, space in enumerate(blocks):
        rows = [costs.of_block(layer, block) for block in space]
        score.append(np.array([_score(scores, shape, layer, block) for block in space]))
        for name in RESOURCES:
            resources[name].append(np.array([row[name] for row in rows]))
    columns: dict[str, Column] = {name: tuple(column) for name, column in resources.items()}
    return Problem(
        options=tuple(tuple(str(block) for block in space) for space in blocks),
        score=tuple(score),
        parent=(0,) * shape.layers,
        resources=columns,
        limits=tuple(_limits(costs)),
    )


def block_scores(
    scores: list[ScoreRecord], composition: str, objective: str, variants: VariantsSpec, shape: ModelShape
) -> dict[tuple[int, BlockVariant], float]:
    """Scores by layer and block variant; with single subblocks, a block's score is the sum of its halves'.

    Raises:
        CoverageError: a half of a block has no score.
    """
    measured = {(score.layer, score.block): OBJECTIVES[objective](score) for score in scores}
    if composition == "pairs":
        return measured
    own, summed = shape.parent_block, {}
    for layer in range(shape.layers):
        for block in variants.blocks_of_layer(layer, shape):
            alone = [own.model_copy(update={"attention": block.attention}), own.model_copy(update={"ffn": block.ffn})]
            summed[layer, block] = sum(_score(measured, shape, layer, half) for half in alone)
    return summed


def limit_uses(costs: Costs, architecture: Architecture) -> tuple[LimitUse, ...]:
    """Every limit of the scenario with what this architecture uses of it."""
    outside, problem_limits = costs.outside(), _limits(costs)
    blocks = [costs.of_block(layer, block) for layer, block in enumerate(architecture.layers)]
    uses = []
    for limit in problem_limits:
        fixed = 0.0 if limit.name.startswith("block_") else outside[limit.resource]
        used = sum(row[limit.resource] for row in blocks)
        uses.append(
            LimitUse(name=limit.name, unit=limit.unit, allowed=limit.capacity + fixed, used=used + fixed, outside=fixed)
        )
    return tuple(uses)


def explain(error: InfeasibleError, costs: Costs) -> str:
    """Why nothing meets the limits, in the terms of the spec: what was asked and the least that can be had."""
    asked = costs.scenario.limits.model_dump()
    parts = []
    for conflict in error.conflicts:
        name, least = conflict.limit.name, conflict.least_alone if conflict.least is None else conflict.least
        held = " with the other limits held" if len(error.conflicts) > 1 and conflict.least is not None else ""
        parts.append(f"{name} was {asked[name]}, and {_best_text(conflict.limit, least, costs)} can be reached{held}")
    return "; ".join(parts) + ": relax a limit, or add cheaper variants"


def _best_text(limit: Limit, least: float, costs: Costs) -> str:
    """The least use of a limit by blocks as a value of the whole model, rounded so that it can be met."""
    whole, blocks = _parent_totals(costs)
    block_time = limit.name.startswith("block_")
    use = least if block_time else least + costs.outside()[limit.resource]
    share = use / (blocks if block_time else whole)[limit.resource]
    if limit.name == "throughput":
        tokens = costs.batch_size * costs.scenario.generated_tokens
        return f"at most {math.floor(tokens / use * 1e3):,} tok/s ({math.floor(1000 / share) / 10}%)"
    percent = f"{math.ceil(1000 * share) / 10}%"
    if block_time:
        return f"at least {percent}"
    if limit.unit == "bytes":
        return f"at least {math.ceil(use / 2**10):,}KiB ({percent})"
    steps = max(1, costs.scenario.generated_tokens - 1) if limit.name == "time_per_output_token" else 1
    return f"at least {math.ceil(1e3 * use / steps) / 1e3:,}ms ({percent})"


def _parent_totals(costs: Costs) -> tuple[dict[str, float], dict[str, float]]:
    """All resources of the whole parent, and of its blocks alone."""
    own, outside = costs.of_block(0, costs.shape.parent_block), costs.outside()
    blocks = {name: costs.shape.layers * value for name, value in own.items()}
    return {name: blocks[name] + outside[name] for name in RESOURCES}, blocks


def _score(
    scores: Mapping[tuple[int, BlockVariant], float], shape: ModelShape, layer: int, block: BlockVariant
) -> float:
    if block == shape.parent_block:
        return 0.0
    if (layer, block) not in scores:
        raise CoverageError(f"layer {layer} {block} has no score: score it, or take it out of `variants`")
    return scores[layer, block]


def _limits(costs: Costs) -> list[Limit]:
    """Limits as capacities of the blocks alone: what lies outside is taken off."""
    spec, outside = costs.scenario.limits, costs.outside()
    whole, parent_blocks = _parent_totals(costs)
    limits = []
    for name, text in spec.model_dump(exclude_none=True).items():
        resource, unit = _RESOURCE_OF[name]
        quantity = _parse(name, text)
        if name.startswith("block_"):
            capacity = quantity.value * parent_blocks[resource]
        elif quantity.relative:
            share = 1 / quantity.value if name == "throughput" else quantity.value
            capacity = share * whole[resource] - outside[resource]
        else:
            capacity = _absolute(name, quantity.value, costs) - outside[resource]
        limits.append(Limit(name, resource, capacity, unit))
    return limits


_RESOURCE_OF = {
    "memory": ("memory_bytes", "bytes"),
    "parameters": ("parameter_bytes", "bytes"),
    "throughput": ("total_ms", "ms"),
    "time_to_first_token": ("prefill_ms", "ms"),
    "time_per_output_token": ("decode_ms", "ms"),
    "latency": ("total_ms", "ms"),
    "block_time": ("total_ms", "ms"),
    "block_prefill_time": ("prefill_ms", "ms"),
    "block_decode_time": ("decode_ms", "ms"),
}
assert _RESOURCE_OF.keys() == LimitsSpec.model_fields.keys()


def _parse(name: str, text: str) -> Quantity:
    if name in ("memory", "parameters"):
        return parse_bytes(text)
    if name == "throughput":
        return parse_throughput(text)
    return parse_share(text) if name.startswith("block_") else parse_seconds(text)


def _absolute(name: str, value: float, costs: Costs) -> float:
    """An absolute limit in the unit of its resource, for the whole model."""
    generated = costs.scenario.generated_tokens
    if name == "throughput":
        return costs.batch_size * generated / value * 1e3
    if name == "time_per_output_token":
        return value * 1e3 * max(1, generated - 1)
    return value if name in ("memory", "parameters") else value * 1e3
