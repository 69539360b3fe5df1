"""From tables and a request to search problems: one for every combination of batch sizes (METHOD sections 5 and 6).

What lies outside the blocks is taken off each limit first. Options that the form forbids are left out. Shares in limits
are of what the parent takes at the same batch size.

Legend: L layers, J options of a layer. A column is a tuple of L arrays (J,), as in `problem.py`.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, BlockVariant
from puzzle_core.errors import SpecError
from puzzle_core.quantities import (
    Quantity,
    column_unit,
    parse_bytes,
    parse_column,
    parse_parameters,
    parse_seconds,
    parse_share,
    parse_throughput,
)
from puzzle_core.search.problem import Column, Limit, Problem
from puzzle_core.search.rules import AllOrNone, AtMostDistinct, Rule
from puzzle_core.search.search_record import LimitUse, Prediction
from puzzle_core.search.tables import OUTSIDE, CostTable, Option, ScoreTable
from puzzle_core.spec import FormSpec, ScenarioSpec, SearchRequest, allows

MIX = "mix"
"""In the names of limits and resources: the weighted mix of all scenarios."""
DERIVED = {
    "memory_bytes": ("parameter_bytes", "kv_bytes_per_token"),
    "runtime_ms": ("prefill_ms", "decode_ms"),
    "active_parameters": ("parameters",),
}
"""Columns that are computed from others where a table does not have them."""

BatchSizes = Mapping[str, int]
"""The batch size of every scenario, by its name."""


@dataclass(frozen=True)
class _Kind:
    """What a limit is on: a column, and how the limit is written and read."""

    column: str
    unit: str
    parse: Callable[[str], Quantity]
    outside: bool = True


KINDS = {
    "memory": _Kind("memory_bytes", "bytes", parse_bytes),
    "parameters": _Kind("parameters", "params", parse_parameters),
    "active_parameters": _Kind("active_parameters", "params", parse_parameters),
    "kv_bytes_per_token": _Kind("kv_bytes_per_token", "bytes", parse_bytes),
    "throughput": _Kind("runtime_ms", "tok/s", parse_throughput),
    "time_to_first_token": _Kind("prefill_ms", "ms", parse_seconds),
    "time_per_output_token": _Kind("decode_ms", "ms", parse_seconds),
    "latency": _Kind("runtime_ms", "ms", parse_seconds),
    "block_time": _Kind("runtime_ms", "ms", parse_share, outside=False),
    "block_prefill_time": _Kind("prefill_ms", "ms", parse_share, outside=False),
    "block_decode_time": _Kind("decode_ms", "ms", parse_share, outside=False),
}


@dataclass(frozen=True)
class ResolvedLimit:
    """One limit of a request at given batch sizes.

    `capacity` and `outside` are in the unit of the resource; `tokens` turns its time into a throughput, `steps` into a
    time per step.
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
    def label(self) -> str:
        """Its name among all limits."""
        return f"{self.scenario}/{self.name}"

    def limit(self) -> Limit:
        """The limit on the blocks alone."""
        return Limit(self.label, self.resource, self.capacity - self.outside, "ms" if self.tokens else self.unit)

    def in_terms(self, total: float) -> float:
        """A whole use of the resource as the limit speaks of it."""
        return self.tokens / total * 1e3 if self.tokens else total / self.steps

    def capacity_of(self, value: float) -> float:
        """The capacity of the blocks alone at which the limit has this value."""
        return (self.tokens / value * 1e3 if self.tokens else value * self.steps) - self.outside

    def use(self, blocks: float) -> LimitUse:
        """The limit with what blocks use of it."""
        return LimitUse(
            scenario=self.scenario,
            name=self.name,
            asked=self.text,
            unit=self.unit,
            sense="at_least" if self.tokens else "at_most",
            allowed=self.in_terms(self.capacity),
            used=self.in_terms(blocks + self.outside),
        )


@dataclass
class ProblemBuilder:
    """A request over tables. Nothing of the tables changes; columns are computed once per scenario and batch size.

    Attributes:
        form: the rules of form, those of the engines that must run the child among them.
        layers: the options of every layer that the form allows, the parent's own first.

    Raises (on construction):
        SpecError: the form forbids the parent's own block, names a layer that is not there, or a limit is on a column
            that the cost table does not have.
    """

    request: SearchRequest
    scores: ScoreTable
    costs: CostTable
    form: FormSpec = field(init=False)
    layers: tuple[tuple[Option, ...], ...] = field(init=False)
    _costs: dict[tuple[str, str, int, Hashable], float] = field(default_factory=dict, init=False, repr=False)
    _columns: dict[tuple[str, tuple[int, ...]], Column] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.form = self.request.served_form
        _check_form(self.request, self.form, self.scores)
        own = Option(self.scores.parent)
        self.layers = tuple(
            (own, *(option for option in scores if option != own and self._allowed(layer, option)))
            for layer, scores in enumerate(self.scores.layers)
        )
        for scenario in self.request.scenarios:
            for name in scenario.limits.asked():
                self._check_column(scenario.name, name)
        if self.request.mix:
            for scenario in self.request.scenarios:
                self._check_column(scenario.name, "latency")

    def problem(self, batch_sizes: BatchSizes) -> Problem:
        """The problem at these batch sizes, with every limit of the request.

        Resources have the names `scenario/column`, and `mix/column` for the mix. Those of limits are there, and the
        main scenario's `runtime_ms` and `parameters` where the table has them.

        Raises:
            CoverageError: an option has no cost.
        """
        asked = self.asked(batch_sizes)
        main = self.request.scenario.name
        wanted = {limit.resource for limit in asked}
        wanted |= {f"{main}/{column}" for column in ("runtime_ms", "parameters") if self._has(column)}
        covering = self._covering()
        return Problem(
            options=tuple(
                (
                    *(str(option) for option in options),
                    *(f"covered by layer {first}: {option}" for first, option in more),
                )
                for options, more in zip(self.layers, covering, strict=True)
            ),
            score=self.column(lambda layer, option: self.scores.layers[layer][option]),
            parent=(0,) * len(self.layers),
            resources={name: self._resource(name, batch_sizes) for name in sorted(wanted)},
            limits=tuple(limit.limit() for limit in asked),
            rules=tuple(self._rules(covering)),
        )

    def asked(self, batch_sizes: BatchSizes) -> list[ResolvedLimit]:
        """Every limit, with its capacity at these batch sizes."""
        found = []
        for scenario in self.request.scenarios:
            batch = batch_sizes[scenario.name]
            for name, text in scenario.limits.asked().items():
                kind = KINDS.get(name) or _Kind(name, column_unit(name), functools.partial(parse_column, name))
                resource = f"{scenario.name}/{kind.column}"
                tokens = float(batch * scenario.counted_tokens) if name == "throughput" else 0.0
                steps = max(1, scenario.generated_tokens - 1) if name == "time_per_output_token" else 1
                found.append(self._ask(scenario.name, name, text, resource, kind, tokens, steps, batch_sizes))
        for name, text in self.request.mix.asked().items() if self.request.mix else ():
            column = "request_ms" if name == "throughput" else "runtime_ms"
            weights = self._weights()
            tokens = sum(w * s.counted_tokens for s, w in weights) if name == "throughput" else 0.0
            found.append(self._ask(MIX, name, text, f"{MIX}/{column}", KINDS[name], tokens, 1, batch_sizes))
        return found

    def options_of(self, choice: Sequence[int]) -> list[Option | None]:
        """The options that a choice in `problem` names; None for a layer that an earlier one's option covers."""
        return [
            options[index] if index < len(options) else None for options, index in zip(self.layers, choice, strict=True)
        ]

    def predict(self, architecture: Architecture, batch_sizes: BatchSizes) -> dict[str, Prediction]:
        """What a whole child takes in every scenario, in all columns that are there; empty layers take nothing."""
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
        """Prefill plus decode of every subblock variant, and of what lies outside, in the main scenario."""
        main = self.request.scenario
        parts = {
            OUTSIDE,
            *(str(v) for options in self.layers for option in options for v in option.block.subblocks),
        }
        found = {}
        for part in sorted(parts):
            values = [
                self.costs.part(column, part, main.name, batch_sizes[main.name]) for column in DERIVED["runtime_ms"]
            ]
            if None not in values:
                found[part] = sum(value for value in values if value)
        return found

    def limit_uses(self, architecture: Architecture, batch_sizes: BatchSizes) -> tuple[LimitUse, ...]:
        """Every limit with what this architecture uses of it."""
        uses = []
        for asked in self.asked(batch_sizes):
            blocks = [
                self._resource_of(asked.resource, layer, block, batch_sizes)
                for layer, block in enumerate(architecture.layers)
                if block != EMPTY_BLOCK
            ]
            uses.append(asked.use(sum(blocks)))
        return tuple(uses)

    def _ask(
        self,
        scenario: str,
        name: str,
        text: str,
        resource: str,
        kind: _Kind,
        tokens: float,
        steps: int,
        batch_sizes: BatchSizes,
    ) -> ResolvedLimit:
        outside = self._resource_of(resource, None, None, batch_sizes) if kind.outside else 0.0
        quantity = kind.parse(text)
        if quantity.relative:
            layers = range(len(self.layers))
            blocks = sum(self._resource_of(resource, layer, self.scores.parent, batch_sizes) for layer in layers)
            share = 1 / quantity.value if tokens else quantity.value
            capacity = share * (blocks + outside)
        elif tokens:
            capacity = tokens / quantity.value * 1e3
        else:
            capacity = quantity.value * steps * (1e3 if kind.parse is parse_seconds else 1.0)
        return ResolvedLimit(scenario, name, text, resource, kind.unit, capacity, outside, tokens, steps)

    def _resource(self, name: str, batch_sizes: BatchSizes) -> Column:
        where = name.rsplit("/", 1)[0]
        key = name, tuple(batch for scenario, batch in batch_sizes.items() if where in (MIX, scenario))
        if key not in self._columns:
            self._columns[key] = self.column(
                lambda layer, option: self._resource_of(name, layer, option.block, batch_sizes)
            )
        return self._columns[key]

    def column(self, value: Callable[[int, Option], float]) -> Column:
        """A column over all options; a layer that is covered adds nothing of its own."""
        covering = self._covering()
        return tuple(
            np.array([*(value(layer, option) for option in options), *(0.0 for _ in covering[layer])])
            for layer, options in enumerate(self.layers)
        )

    def _resource_of(self, name: str, layer: int | None, block: BlockVariant | None, batch_sizes: BatchSizes) -> float:
        """A resource of one block, or of what lies outside when there is no block."""
        where, column = name.rsplit("/", 1)

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

    def _cost(self, column: str, layer: int, block: BlockVariant, scenario: ScenarioSpec, batch: int) -> float:
        key = column, scenario.name, batch, (layer, block) if self.costs.by_layer else block
        if key not in self._costs:
            self._costs[key] = self._derived(
                column, scenario, batch, lambda name: self.costs.block(name, layer, block, scenario.name, batch)
            )
        return self._costs[key]

    def _outside(self, column: str, scenario: ScenarioSpec, batch: int) -> float:
        return self._derived(column, scenario, batch, lambda name: self.costs.outside(name, scenario.name, batch))

    def _derived(self, column: str, scenario: ScenarioSpec, batch: int, raw: Callable[[str], float]) -> float:
        if column in self.costs.columns or column not in DERIVED:
            return raw(column)
        if column == "memory_bytes":
            tokens = batch * (scenario.prompt_tokens + scenario.generated_tokens)
            return raw("parameter_bytes") + tokens * raw("kv_bytes_per_token")
        return sum(raw(part) for part in DERIVED[column])

    def _has(self, column: str) -> bool:
        there = set(self.costs.columns)
        return column in there or (column in DERIVED and there.issuperset(DERIVED[column]))

    def _check_column(self, scenario: str, name: str) -> None:
        column = KINDS[name].column if name in KINDS else name
        if not self._has(column):
            parts = f", which is made of {' and '.join(DERIVED[column])}" if column in DERIVED else ""
            raise SpecError(
                f"limit {name} of scenario {scenario} needs the column {column}{parts}, and the cost table does not "
                f"have it (columns: {', '.join(sorted(self.costs.columns))})"
            )

    def _weights(self) -> list[tuple[ScenarioSpec, float]]:
        total = sum(scenario.weight for scenario in self.request.scenarios)
        return [(scenario, scenario.weight / total) for scenario in self.request.scenarios]

    def _covering(self) -> list[list[tuple[int, Option]]]:
        """For every layer: the options of earlier layers that would cover it, with their first layer."""
        covering: list[list[tuple[int, Option]]] = [[] for _ in self.layers]
        for first, options in enumerate(self.layers):
            for option in options:
                for layer in range(first + 1, first + option.span):
                    covering[layer].append((first, option))
        return covering

    def _rules(self, covering: list[list[tuple[int, Option]]]) -> list[Rule]:
        form, rules = self.form, list[Rule]()
        if form.max_ffn_widths:
            rules.append(self._distinct("different FFN widths", _ffn_width, form.max_ffn_widths, covering))
        if form.uniform_kv_heads:
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
        form, own, count = self.form, self.scores.parent, len(self.scores.layers)
        covered = range(layer, layer + option.span)
        for kept, subblock in ((form.keep.attention, "attention"), (form.keep.ffn, "ffn")):
            changed = getattr(option.block, subblock) != getattr(own, subblock)
            if any(index % count in covered for index in kept) and (changed or option.span > 1):
                return False
        if form.attention_first and layer == 0 and not option.block.attention.kv_heads:
            return False
        return all(allows(form, self.request.engines, variant) for variant in option.block.subblocks)


def _kv_heads(block: BlockVariant) -> int:
    return block.attention.kv_heads


def _ffn_width(block: BlockVariant) -> int:
    return block.ffn.ffn_width


def _check_form(request: SearchRequest, form: FormSpec, scores: ScoreTable) -> None:
    count = len(scores.layers)
    for subblock, layers in (("attention", form.keep.attention), ("ffn", form.keep.ffn)):
        for layer in layers:
            if not -count <= layer < count:
                raise SpecError(f"form.keep.{subblock} names layer {layer}, and there are {count} layers")
    for variant in scores.parent.subblocks:
        if not allows(form, request.engines, variant):
            of_engines = f", for engines {', '.join(request.engines)}" if request.engines else ""
            raise SpecError(
                f"form rules out the parent's own {variant}: see ffn_multiple_of ({form.ffn_multiple_of}{of_engines}) "
                f"and tensor_parallel ({form.tensor_parallel})"
            )
