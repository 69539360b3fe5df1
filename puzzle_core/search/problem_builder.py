"""From tables and a request to search problems: one for every combination of batch sizes (METHOD sections 5 and 6).

The cost outside the blocks is subtracted from each limit. Options that the constraints forbid are left out. A share in
a limit is relative to the parent's own value at the same batch size.

Legend: L layers, J options of a layer. A column is a tuple of L arrays (J,), as in `problem.py`.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, BlockVariant
from puzzle_core.batching import reserved_tokens, waiting_prompts
from puzzle_core.errors import SpecError
from puzzle_core.quantities import (
    Quantity,
    column_unit,
    parse_bytes,
    parse_column,
    parse_count,
    parse_parameters,
    parse_seconds,
    parse_share,
    parse_throughput,
)
from puzzle_core.search.counts import UNITS as COUNT_UNITS
from puzzle_core.search.counts import counter
from puzzle_core.search.problem import Column, Limit, Problem
from puzzle_core.search.rules import AllOrNone, AtMostDistinct, Rule
from puzzle_core.search.search_record import LimitUse, Prediction
from puzzle_core.search.sensitivity import RELATIVE_STEP
from puzzle_core.search.tables import OUTSIDE, CostTable, Option, ScoreTable
from puzzle_core.spec import ConstraintsSpec, ScenarioSpec, SearchRequest

MIX = "(mix)"
"""The weighted mix of all scenarios, in the names of limits and resources. No scenario can have this name."""
COVERED = "covered by layer"
"""How the id begins of a layer's option that belongs to an option of an earlier layer."""
DERIVED = {
    "memory_bytes": ("parameter_bytes", "kv_bytes_per_token"),
    "runtime_ms": ("prefill_ms", "decode_ms"),
    "active_parameters": ("parameters",),
}
"""Columns that are computed from others when a table lacks them."""

FIRST_TOKEN = "first_token_ms"
"""Of continuous batching: the prefill of one prompt, its wait for others, and one step."""
CONTINUOUS_COLUMNS = {"time_to_first_token": FIRST_TOKEN, "time_per_output_token": "runtime_ms"}
"""The columns of limits that mean something else under continuous batching."""
TARGET_MEMORY = "target_memory"
"""The limit that every scenario has where the target's devices are known: what they hold."""

BatchSizes = Mapping[str, int]
"""The batch size of every scenario, by its name."""


@dataclass(frozen=True)
class _LimitType:
    """The column of a limit, its unit, the parser of its text, and whether the cost outside the blocks counts."""

    column: str
    unit: str
    parse: Callable[[str], Quantity]
    outside: bool = True


LIMIT_TYPES = {
    "memory": _LimitType("memory_bytes", "bytes", parse_bytes),
    "parameters": _LimitType("parameters", "params", parse_parameters),
    "active_parameters": _LimitType("active_parameters", "params", parse_parameters),
    "kv_bytes_per_token": _LimitType("kv_bytes_per_token", "bytes", parse_bytes),
    "throughput": _LimitType("runtime_ms", "tok/s", parse_throughput),
    "time_to_first_token": _LimitType("prefill_ms", "ms", parse_seconds),
    "time_per_output_token": _LimitType("decode_ms", "ms", parse_seconds),
    "latency": _LimitType("runtime_ms", "ms", parse_seconds),
    "block_time": _LimitType("runtime_ms", "ms", parse_share, outside=False),
    "block_prefill_time": _LimitType("prefill_ms", "ms", parse_share, outside=False),
    "block_decode_time": _LimitType("decode_ms", "ms", parse_share, outside=False),
}


@dataclass(frozen=True)
class ResolvedLimit:
    """One limit of a request at given batch sizes.

    Attributes:
        capacity, outside: of the whole model and of the parts outside the blocks, in the unit of the resource.
        tokens: tokens per batch, which turn a time into a throughput; 0 for other limits.
        steps: decode steps, which turn a time into a time per step; 1 for other limits.
    """

    scenario: str
    name: str
    text: str
    resource: str
    unit: str
    capacity: float
    outside: float
    tokens: float
    steps: int

    @property
    def step(self) -> float:
        """The step that its price is for: 1 of a count, a hundredth of another capacity."""
        return 1.0 if self.unit in COUNT_UNITS.values() else RELATIVE_STEP * self.capacity

    @property
    def label(self) -> str:
        """The unique name of the limit."""
        return f"{self.scenario}/{self.name}"

    def limit(self) -> Limit:
        """The limit on the blocks alone."""
        return Limit(self.label, self.resource, self.capacity - self.outside, "ms" if self.tokens else self.unit)

    def in_terms(self, total: float) -> float:
        """The use of a whole model in the terms of the limit: a throughput, a time per step, or the use itself.

        A throughput of no time is infinite.
        """
        if self.tokens:
            return self.tokens / total * 1e3 if total > 0 else math.inf
        return total / self.steps

    def capacity_of(self, value: float) -> float:
        """The capacity of the blocks alone when the limit has this value."""
        return (self.tokens / value * 1e3 if self.tokens else value * self.steps) - self.outside

    def use(self, blocks: float) -> LimitUse:
        """The limit, with the use of all blocks together."""
        usage = self.in_terms(blocks + self.outside)
        return LimitUse(
            scenario=self.scenario,
            name=self.name,
            text=self.text,
            unit=self.unit,
            sense="at_least" if self.tokens else "at_most",
            threshold=self.in_terms(self.capacity),
            usage=usage if math.isfinite(usage) else None,
        )


@dataclass
class ProblemBuilder:
    """A request and its tables. The tables do not change; columns are computed once per scenario and batch size.

    Attributes:
        constraints: those of the request and of the engines that must run the child.
        layers: the options of every layer that the constraints allow, the parent's own first.

    Raises (on construction):
        SpecError: the constraints forbid the parent's own block or name a layer that does not exist, a limit is on a
            column that the cost table does not have, or its rows spell a scenario in another way.
    """

    request: SearchRequest
    scores: ScoreTable
    costs: CostTable
    constraints: ConstraintsSpec = field(init=False)
    layers: tuple[tuple[Option, ...], ...] = field(init=False)
    _costs: dict[tuple[str, str, int, Hashable], float] = field(default_factory=dict, init=False, repr=False)
    _columns: dict[tuple[str, tuple[int, ...]], Column] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.constraints = self.request.constraints.for_engines(self.request.engines)
        _check_constraints(self.request, self.constraints, self.scores)
        self.costs.check_scenarios(scenario.name for scenario in self.request.scenarios)
        own = [Option(block) for block in self.scores.parent.layers]
        self.layers = tuple(
            (own[layer], *(option for option in scores if option != own[layer] and self._allowed(layer, option)))
            for layer, scores in enumerate(self.scores.layers)
        )
        for scenario in self.request.scenarios:
            self._check_batch_sizes(scenario)
            for name in scenario.limits.by_name():
                if not counter(name, scenario.limits):
                    self._check_column(scenario.name, name)
        if self.request.mix:
            for scenario in self.request.scenarios:
                self._check_column(scenario.name, "latency")

    @property
    def reference(self) -> Architecture:
        """The architecture whose values shares in limits are of."""
        return self.scores.reference or self.scores.parent

    def problem(self, batch_sizes: BatchSizes) -> Problem:
        """The problem at these batch sizes, with every limit of the request.

        Resources are named `scenario/column`, and `(mix)/column` for the mix: those of all limits, and `runtime_ms` and
        `parameters` of the main scenario if the table has them.

        Raises:
            CoverageError: an option has no cost.
        """
        limits = self.limits(batch_sizes)
        main = self.request.scenario.name
        resources = {limit.resource for limit in limits}
        resources |= {f"{main}/{column}" for column in ("runtime_ms", "parameters") if self._has(column)}
        covering = self._covering()
        return Problem(
            options=tuple(
                (
                    *(str(option) for option in options),
                    *(f"{COVERED} {first}: {option}" for first, option in more),
                )
                for options, more in zip(self.layers, covering, strict=True)
            ),
            score=self.column(lambda layer, option: self.scores.layers[layer][option]),
            parent=(0,) * len(self.layers),
            resources={name: self._resource(name, batch_sizes) for name in sorted(resources)},
            limits=tuple(limit.limit() for limit in limits),
            rules=tuple(self._rules(covering)),
        )

    def limits(self, batch_sizes: BatchSizes) -> list[ResolvedLimit]:
        """Every limit, with its capacity at these batch sizes."""
        limits = []
        for scenario in self.request.scenarios:
            batch = batch_sizes[scenario.name]
            for name, text in scenario.limits.by_name().items():
                limit_type = LIMIT_TYPES.get(name) or _LimitType(
                    name, column_unit(name), functools.partial(parse_column, name)
                )
                if counter(name, scenario.limits):
                    limit_type = _LimitType(name, COUNT_UNITS.get(name, "layers"), parse_count)
                resource = f"{scenario.name}/{limit_type.column}"
                tokens = float(batch * scenario.counted_tokens) if name == "throughput" else 0.0
                steps = max(1, scenario.generated_tokens - 1) if name == "time_per_output_token" else 1
                if scenario.batching == "continuous" and name in CONTINUOUS_COLUMNS:
                    resource = f"{scenario.name}/{CONTINUOUS_COLUMNS[name]}"
                    steps = scenario.generated_tokens if name == "time_per_output_token" else 1
                limits.append(
                    self._resolve(scenario.name, name, text, resource, limit_type, tokens, steps, batch_sizes)
                )
            if served_on := self.request.served_on:
                resource = f"{scenario.name}/memory_bytes"
                text, limit_type = served_on.memory, LIMIT_TYPES["memory"]
                limits.append(
                    self._resolve(scenario.name, TARGET_MEMORY, text, resource, limit_type, 0.0, 1, batch_sizes)
                )
        for name, text in self.request.mix.by_name().items() if self.request.mix else ():
            column = "request_ms" if name == "throughput" else "runtime_ms"
            weights = self._weights()
            tokens = sum(w * s.counted_tokens for s, w in weights) if name == "throughput" else 0.0
            resource = f"{MIX}/{column}"
            limits.append(self._resolve(MIX, name, text, resource, LIMIT_TYPES[name], tokens, 1, batch_sizes))
        return limits

    def options_of(self, choice: Sequence[int]) -> list[Option | None]:
        """The options of a choice of `problem`; None for a layer that the option of an earlier layer covers."""
        return [
            options[index] if index < len(options) else None for options, index in zip(self.layers, choice, strict=True)
        ]

    def predict(self, architecture: Architecture, batch_sizes: BatchSizes) -> dict[str, Prediction]:
        """The costs of a whole child in every scenario, in all columns; an empty layer costs nothing."""
        predictions = {}
        for scenario in self.request.scenarios:
            batch = batch_sizes[scenario.name]
            totals = {}
            for column in sorted({*self.costs.columns, *(name for name in DERIVED if self._has(name))}):
                parts = [
                    self._cost(column, layer, block, scenario, batch)
                    for layer, block in enumerate(architecture.layers)
                    if block != EMPTY_BLOCK
                ]
                totals[column] = sum(parts) + self._outside(column, scenario, batch)
            predictions[scenario.name] = Prediction(batch_size=batch, totals=totals)
        return predictions

    def times(self, batch_sizes: BatchSizes) -> dict[str, float]:
        """Prefill plus decode in ms in the main scenario: of every subblock variant, and outside the blocks."""
        main = self.request.scenario
        parts = {
            OUTSIDE,
            *(str(v) for options in self.layers for option in options for v in option.block.subblocks),
        }
        times = {}
        for part in sorted(parts):
            values = [
                self.costs.part(column, part, main.name, batch_sizes[main.name]) for column in DERIVED["runtime_ms"]
            ]
            if None not in values:
                times[part] = sum(value for value in values if value)
        return times

    def limit_uses(self, architecture: Architecture, batch_sizes: BatchSizes) -> tuple[LimitUse, ...]:
        """Every limit, with the use of this architecture."""
        uses = []
        for limit in self.limits(batch_sizes):
            blocks = [
                self._resource_of(limit.resource, layer, block, batch_sizes)
                for layer, block in enumerate(architecture.layers)
                if block != EMPTY_BLOCK or self._counter(limit.resource)
            ]
            uses.append(limit.use(sum(blocks)))
        return tuple(uses)

    def outside(self, resource: str, batch_sizes: BatchSizes) -> float:
        """What the parts outside the blocks take of a resource of `problem`."""
        return self._resource_of(resource, None, None, batch_sizes)

    def _resolve(
        self,
        scenario: str,
        name: str,
        text: str,
        resource: str,
        limit_type: _LimitType,
        tokens: float,
        steps: int,
        batch_sizes: BatchSizes,
    ) -> ResolvedLimit:
        outside = self.outside(resource, batch_sizes) if limit_type.outside else 0.0
        quantity = limit_type.parse(text)
        if quantity.relative:
            whole = enumerate(self.reference.layers)
            blocks = sum(self._resource_of(resource, layer, block, batch_sizes) for layer, block in whole)
            if not blocks + outside:
                unit = f"limit with a unit, or fill in the cost table's {resource.partition('/')[2]}"
                raise SpecError(
                    f"limit {name} of scenario {scenario} is {text} of the parent's value, which is 0: give a "
                    f"{'number' if self._counter(resource) else unit}"
                )
            share = 1 / quantity.value if tokens else quantity.value
            capacity = share * (blocks + outside)
        elif tokens:
            capacity = tokens / quantity.value * 1e3
        else:
            capacity = quantity.value * steps * (1e3 if limit_type.parse is parse_seconds else 1.0)
        return ResolvedLimit(scenario, name, text, resource, limit_type.unit, capacity, outside, tokens, steps)

    def _resource(self, name: str, batch_sizes: BatchSizes) -> Column:
        where = name.split("/", 1)[0]
        key = name, tuple(batch for scenario, batch in batch_sizes.items() if where in (MIX, scenario))
        if key not in self._columns:
            count = self._counter(name)
            self._columns[key] = self.column(
                lambda layer, option: self._resource_of(name, layer, option.block, batch_sizes),
                covered=count(EMPTY_BLOCK) if count else 0.0,
            )
        return self._columns[key]

    def _counter(self, resource: str) -> Callable[[BlockVariant], float] | None:
        """What a resource counts in a block, if it is a count."""
        where, name = resource.split("/", 1)
        limits = next((scenario.limits for scenario in self.request.scenarios if scenario.name == where), None)
        return counter(name, limits) if limits else None

    def column(self, value: Callable[[int, Option], float], covered: float = 0.0) -> Column:
        """A column over all options; `covered` for a layer that an earlier option covers."""
        covering = self._covering()
        return tuple(
            np.array([*(value(layer, option) for option in options), *(covered for _ in covering[layer])])
            for layer, options in enumerate(self.layers)
        )

    def _resource_of(self, name: str, layer: int | None, block: BlockVariant | None, batch_sizes: BatchSizes) -> float:
        """A resource of one block, or of the parts outside the blocks when `block` is None."""
        if count := self._counter(name):
            return 0.0 if block is None else count(block)
        where, column = name.split("/", 1)

        def of_scenario(scenario: ScenarioSpec, column: str) -> float:
            batch = batch_sizes[scenario.name]
            if layer is None or block is None:
                return self._outside(column, scenario, batch)
            return self._cost(column, layer, block, scenario, batch)

        if where != MIX:
            return of_scenario(next(s for s in self.request.scenarios if s.name == where), column)
        per_request = column == "request_ms"
        return sum(
            weight * of_scenario(scenario, "runtime_ms") / (batch_sizes[scenario.name] if per_request else 1)
            for scenario, weight in self._weights()
        )

    def _check_batch_sizes(self, scenario: ScenarioSpec) -> None:
        served_on = self.request.served_on
        most = served_on.max_sequences if served_on else None
        if served_on and most and max(scenario.batch_sizes) > most:
            raise SpecError(
                f"scenario {scenario.name} has batch size {max(scenario.batch_sizes):,}, and the engine on "
                f"{served_on.devices} takes {most:,} sequences at a time: leave larger ones out, or raise "
                "target.hardware.serving.max_sequences"
            )

    def _waiting_prompts(self, scenario: ScenarioSpec, batch: int) -> float:
        """Prefills that a new prompt waits for, of the reference: a queue of equal jobs with one server (M/D/1)."""
        totals = {}
        for column in DERIVED["runtime_ms"]:
            layers = enumerate(self.reference.layers)
            blocks = sum(
                self._cost(column, layer, block, scenario, batch) for layer, block in layers if block != EMPTY_BLOCK
            )
            totals[column] = blocks + self._outside(column, scenario, batch)
        return waiting_prompts(totals["prefill_ms"], sum(totals.values()))

    def _cost(self, column: str, layer: int, block: BlockVariant, scenario: ScenarioSpec, batch: int) -> float:
        if column == FIRST_TOKEN:
            return self._first_token(scenario, batch, lambda name, of: self._cost(name, layer, block, scenario, of))
        key = column, scenario.name, batch, (layer, block) if self.costs.by_layer else block
        if key not in self._costs:
            self._costs[key] = self._derived(
                column, scenario, batch, lambda name: self.costs.block(name, layer, block, scenario.name, batch)
            )
        return self._costs[key]

    def _first_token(self, scenario: ScenarioSpec, batch: int, cost: Callable[[str, int], float]) -> float:
        """The prefill of one prompt, its wait for others, and a step of the batch."""
        wait, steps = self._waiting_prompts(scenario, batch), max(1, scenario.generated_tokens - 1)
        return (1 + wait) * cost("prefill_ms", 1) + cost("decode_ms", batch) / steps

    def _outside(self, column: str, scenario: ScenarioSpec, batch: int) -> float:
        if column == FIRST_TOKEN:
            return self._first_token(scenario, batch, lambda name, of: self._outside(name, scenario, of))
        return self._derived(column, scenario, batch, lambda name: self.costs.outside(name, scenario.name, batch))

    def _derived(self, column: str, scenario: ScenarioSpec, batch: int, raw: Callable[[str], float]) -> float:
        if column in self.costs.columns or column not in DERIVED:
            return raw(column)
        if column == "memory_bytes":
            served_on = self.request.served_on
            held = reserved_tokens(
                served_on.reservation if served_on else "guaranteed", scenario.prompt_tokens, scenario.generated_tokens
            )
            tokens = batch * held
            return raw("parameter_bytes") + tokens * raw("kv_bytes_per_token")
        return sum(raw(part) for part in DERIVED[column])

    def _has(self, column: str) -> bool:
        columns = self.costs.columns
        return column in columns or (column in DERIVED and columns.issuperset(DERIVED[column]))

    def _check_column(self, scenario: str, name: str) -> None:
        column = LIMIT_TYPES[name].column if name in LIMIT_TYPES else name
        if not self._has(column):
            parts = f" or {' and '.join(DERIVED[column])}" if column in DERIVED else ""
            raise SpecError(
                f"limit {name} of scenario {scenario} needs the column {column}{parts}, and the cost table does not "
                f"have it (columns: {', '.join(sorted(self.costs.columns))})"
            )

    def _weights(self) -> list[tuple[ScenarioSpec, float]]:
        total = sum(scenario.weight for scenario in self.request.scenarios)
        return [(scenario, scenario.weight / total) for scenario in self.request.scenarios]

    def _covering(self) -> list[list[tuple[int, Option]]]:
        """For every layer: the options of earlier layers that span it, each with its first layer."""
        covering: list[list[tuple[int, Option]]] = [[] for _ in self.layers]
        for first, options in enumerate(self.layers):
            for option in options:
                for layer in range(first + 1, first + option.span):
                    covering[layer].append((first, option))
        return covering

    def _rules(self, covering: list[list[tuple[int, Option]]]) -> list[Rule]:
        constraints, rules = self.constraints, list[Rule]()
        if constraints.max_ffn_widths:
            rules.append(self._distinct("different FFN widths", _ffn_width, constraints.max_ffn_widths, covering))
        if constraints.uniform_kv_heads:
            rules.append(self._distinct("different numbers of KV heads", _kv_heads, 1, covering))
        for first, options in enumerate(self.layers):
            for index, option in enumerate(options):
                members = [(first, index)] + [
                    (layer, len(self.layers[layer]) + covering[layer].index((first, option)))
                    for layer in range(first + 1, first + option.span)
                ]
                if option.span > 1:
                    rules.append(AllOrNone(f"layer {first} {option}", tuple(members)))
        return rules

    def _distinct(
        self, name: str, size: Callable[[BlockVariant], int], at_most: int, covering: list[list[tuple[int, Option]]]
    ) -> AtMostDistinct:
        groups = tuple(
            np.array([*(size(option.block) or -1 for option in options), *(-1 for _ in more)])
            for options, more in zip(self.layers, covering, strict=True)
        )
        return AtMostDistinct(name, groups, at_most)

    def _allowed(self, layer: int, option: Option) -> bool:
        constraints, parent, count = self.constraints, self.scores.parent.layers[layer], len(self.scores.layers)
        covered = range(layer, layer + option.span)
        for kept, subblock in ((constraints.keep.attention, "attention"), (constraints.keep.ffn, "ffn")):
            changed = getattr(option.block, subblock) != getattr(parent, subblock)
            if any(index % count in covered for index in kept) and (changed or option.span > 1):
                return False
        if constraints.attention_first and layer == 0 and not option.block.attention.kv_heads:
            return False
        return all(constraints.allows(variant, self.request.engines) for variant in option.block.subblocks)


def _kv_heads(block: BlockVariant) -> int:
    return block.attention.kv_heads


def _ffn_width(block: BlockVariant) -> int:
    return block.ffn.ffn_width


def _check_constraints(request: SearchRequest, constraints: ConstraintsSpec, scores: ScoreTable) -> None:
    count = len(scores.layers)
    for subblock, layers in (("attention", constraints.keep.attention), ("ffn", constraints.keep.ffn)):
        for layer in layers:
            if not -count <= layer < count:
                raise SpecError(f"constraints.keep.{subblock} names layer {layer}, and there are {count} layers")
    for variant in dict.fromkeys(variant for block in scores.parent.layers for variant in block.subblocks):
        if not constraints.allows(variant, request.engines):
            of_engines = f", for engines {', '.join(request.engines)}" if request.engines else ""
            raise SpecError(
                f"constraints rule out the parent's own {variant}: see ffn_multiple_of "
                f"({constraints.ffn_multiple_of}{of_engines}) and tensor_parallel ({constraints.tensor_parallel})"
            )
