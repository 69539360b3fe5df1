"""Tables of scores and costs: the inputs of a search, from a run or from a user's files. No torch.

A score belongs to a layer and a block variant. A cost row has the values of a part: a block variant, a subblock
variant, or everything `outside` the blocks. A row holds for one scenario, batch size or layer, or for all of them. If
several rows have the same column, the most specific row is used.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.architecture import Option as Option
from puzzle_core.errors import CoverageError, NonFiniteError, SpecError

OUTSIDE = "outside"


@dataclass(frozen=True)
class ScoreTable:
    """The score of every option of every layer, lower is better; the parent's own block is one of them.

    `lm_loss` scores the same options by the increase of the next-token loss, if it is known and is not the main score.
    Shares in limits are of what `reference` takes, the first parent where children became parents; by default `parent`.

    Raises (on construction):
        CoverageError: a layer lacks the parent's own block, or an option spans layers beyond the last.
        NonFiniteError: a score is NaN or infinite.
    """

    parent: Architecture
    layers: tuple[Mapping[Option, float], ...]
    objective: str = "score"
    lm_loss: tuple[Mapping[Option, float], ...] | None = None
    reference: Architecture | None = None

    def __post_init__(self) -> None:
        for layer, scores in enumerate(self.layers):
            if Option(self.parent.layers[layer]) not in scores:
                raise CoverageError(f"layer {layer} has no score of the parent's own block {self.parent.layers[layer]}")
            for option, score in scores.items():
                if not math.isfinite(score):
                    raise NonFiniteError(f"the {self.objective} of layer {layer} {option} is {score}: score it again")
                if layer + option.span > len(self.layers):
                    raise CoverageError(
                        f"layer {layer} {option} spans layers that {len(self.layers)} layers do not have"
                    )

    @property
    def largest(self) -> float:
        """The largest score."""
        return max(max(scores.values()) for scores in self.layers)


class CostRow(NamedTuple):
    """One row: the values of a part and where they hold. None means all layers, batch sizes or scenarios."""

    part: str
    values: Mapping[str, float]
    layer: int | None = None
    batch_size: int | None = None
    scenario: str | None = None
    origin: str = ""

    @property
    def place(self) -> str:
        """The part and scope of the row, for messages."""
        about = [self.part]
        about += [f"layer {self.layer}"] if self.layer is not None else []
        about += [f"batch size {self.batch_size}"] if self.batch_size is not None else []
        about += [f"scenario {self.scenario}"] if self.scenario is not None else []
        return ", ".join(about) + (f" ({self.origin})" if self.origin else "")


_Scope = tuple[str | None, int | None, int | None]


@dataclass(frozen=True)
class CostTable:
    """Costs of parts by column. The suffix of a column's name gives its unit.

    Raises (on construction):
        NonFiniteError, SpecError: a value is NaN, infinite or negative, or given twice. The error names
            the row and the column.
    """

    rows: tuple[CostRow, ...]
    _values: dict[str, dict[_Scope, dict[str, float]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        by_part: dict[str, dict[_Scope, dict[str, CostRow]]] = {}
        for row in self.rows:
            places = by_part.setdefault(row.part, {}).setdefault((row.scenario, row.batch_size, row.layer), {})
            for column, value in row.values.items():
                if not math.isfinite(value):
                    raise NonFiniteError(f"{column} of {row.place} is {value}: measure it again, or leave the row out")
                if value < 0:
                    raise SpecError(f"{column} of {row.place} is {value:g}: costs cannot be negative")
                if column in places:
                    raise SpecError(f"{column} of {row.place} is given twice, before by {places[column].place}")
                places[column] = row
        for part, scopes in by_part.items():
            self._values[part] = {
                scope: {column: row.values[column] for column, row in rows.items()} for scope, rows in scopes.items()
            }

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """All columns."""
        return frozenset(column for row in self.rows for column in row.values)

    def check_scenarios(self, names: Iterable[str]) -> None:
        """Refuse rows whose scenario is a requested one in another spelling: they would not count.

        Raises:
            SpecError: names the row and the scenario.
        """
        exact = set(names)
        wanted = {_spelling(name): name for name in exact}
        for row in self.rows:
            name = wanted.get(_spelling(row.scenario)) if row.scenario is not None else None
            if name is not None and row.scenario not in exact:
                raise SpecError(
                    f"the costs of {row.place} are for scenario {row.scenario!r}, and the search is for {name!r}: "
                    "spell the scenario alike in both"
                )

    @functools.cached_property
    def by_layer(self) -> bool:
        """Whether any row holds for one layer only."""
        return any(row.layer is not None for row in self.rows)

    def block(self, column: str, layer: int, block: BlockVariant, scenario: str, batch_size: int) -> float:
        """One column of a block variant: from its own row, or the sum over its subblocks.

        Raises:
            CoverageError: the table has neither.
        """
        whole = self._value(str(block), column, layer, scenario, batch_size)
        if whole is not None:
            return whole
        total = 0.0
        for subblock in (str(block.attention), str(block.ffn)):
            value = self._value(subblock, column, layer, scenario, batch_size)
            if value is None:
                raise CoverageError(
                    f"no {column} of {subblock} for layer {layer} ({block}), scenario {scenario}, batch size "
                    f"{batch_size}: add a row for it, or take the variant out of the scores"
                )
            total += value
        return total

    def outside(self, column: str, scenario: str, batch_size: int) -> float:
        """One column of the parts outside the blocks; 0 if no row has it."""
        return self._value(OUTSIDE, column, None, scenario, batch_size) or 0.0

    def part(self, column: str, part: str, scenario: str, batch_size: int) -> float | None:
        """One column of a part for all layers; None if the table does not have it."""
        return self._value(part, column, None, scenario, batch_size)

    def _value(self, part: str, column: str, layer: int | None, scenario: str, batch_size: int) -> float | None:
        scopes = self._values.get(part)
        if scopes is None:
            return None
        for scope in _from_most_specific(scenario, batch_size, layer):
            values = scopes.get(scope)
            if values is not None and column in values:
                return values[column]
        return None


def _spelling(name: str) -> str:
    """Equal for names that are the same number, or that differ in case, spaces, dashes and underscores alone."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return repr(number) if math.isfinite(number) else re.sub(r"[\s_-]+", "", name).casefold()


def _from_most_specific(scenario: str, batch_size: int, layer: int | None) -> Iterable[_Scope]:
    for at_scenario in (scenario, None):
        for at_batch in (batch_size, None):
            yield at_scenario, at_batch, layer
            if layer is not None:
                yield at_scenario, at_batch, None
