"""Scores and costs as tables: what a search is fed with, whether a run made them or a user brings them. No torch.

A score belongs to a layer and a block variant. A cost row gives numbers to a part: a block variant, one of its halves,
or what lies `outside` the blocks. A row may hold for one scenario, batch size or layer, or for all of them; where
several rows give the same column, the most specific one wins.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from puzzle_core.architecture import BlockVariant
from puzzle_core.errors import CoverageError, NonFiniteError, SpecError

OUTSIDE = "outside"


class Option(NamedTuple):
    """A block variant that replaces `span` consecutive layers; the layers after its first are left empty."""

    block: BlockVariant
    span: int = 1

    def __str__(self) -> str:
        return str(self.block) if self.span == 1 else f"{self.block} x{self.span}"


@dataclass(frozen=True)
class ScoreTable:
    """The score of every option of every layer, lower is better; the parent's own option is one of them.

    `lm_loss` scores the same options by the increase of the next-token loss, where that is known and another score.

    Raises (on construction):
        CoverageError: a layer lacks the parent's own block, or an option spans layers that are not there.
        NonFiniteError: a score is NaN or infinite.
    """

    parent: BlockVariant
    layers: tuple[Mapping[Option, float], ...]
    objective: str = "score"
    lm_loss: tuple[Mapping[Option, float], ...] | None = None

    def __post_init__(self) -> None:
        for layer, scores in enumerate(self.layers):
            if Option(self.parent) not in scores:
                raise CoverageError(f"layer {layer} has no score of the parent's own block {self.parent}")
            for option, score in scores.items():
                if not math.isfinite(score):
                    raise NonFiniteError(f"the {self.objective} of layer {layer} {option} is {score}: score it again")
                if layer + option.span > len(self.layers):
                    raise CoverageError(
                        f"layer {layer} {option} spans layers that {len(self.layers)} layers do not have"
                    )

    @property
    def largest(self) -> float:
        """The largest score that was measured."""
        return max(max(scores.values()) for scores in self.layers)


class CostRow(NamedTuple):
    """One row: numbers of a part, and what they hold for; None holds for all."""

    part: str
    values: Mapping[str, float]
    layer: int | None = None
    batch_size: int | None = None
    scenario: str | None = None
    origin: str = ""

    @property
    def place(self) -> str:
        """What the row is about, for messages."""
        about = [self.part]
        about += [f"layer {self.layer}"] if self.layer is not None else []
        about += [f"batch size {self.batch_size}"] if self.batch_size is not None else []
        about += [f"scenario {self.scenario}"] if self.scenario is not None else []
        return ", ".join(about) + (f" ({self.origin})" if self.origin else "")


_Where = tuple[str | None, int | None, int | None]


@dataclass(frozen=True)
class CostTable:
    """Costs of parts by column, in the units that the columns' names end in.

    Raises (on construction):
        NonFiniteError, SpecError: a value is NaN, infinite or negative, or given twice; names the row and the column.
    """

    rows: tuple[CostRow, ...]
    _found: dict[str, dict[_Where, dict[str, float]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        by_part: dict[str, dict[_Where, dict[str, CostRow]]] = {}
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
        for part, wheres in by_part.items():
            self._found[part] = {
                where: {column: row.values[column] for column, row in rows.items()} for where, rows in wheres.items()
            }

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """All columns."""
        return frozenset(column for row in self.rows for column in row.values)

    @functools.cached_property
    def by_layer(self) -> bool:
        """Whether any row holds for one layer only."""
        return any(row.layer is not None for row in self.rows)

    def block(self, column: str, layer: int, block: BlockVariant, scenario: str, batch_size: int) -> float:
        """One column of a block variant: its own row, or the sum of its halves'.

        Raises:
            CoverageError: neither is there.
        """
        whole = self._value(str(block), column, layer, scenario, batch_size)
        if whole is not None:
            return whole
        total = 0.0
        for half in (str(block.attention), str(block.ffn)):
            value = self._value(half, column, layer, scenario, batch_size)
            if value is None:
                raise CoverageError(
                    f"no {column} of {half} for layer {layer} ({block}), scenario {scenario}, batch size {batch_size}: "
                    "add a row for it, or take the variant out of the scores"
                )
            total += value
        return total

    def outside(self, column: str, scenario: str, batch_size: int) -> float:
        """One column of what lies outside the blocks; 0 where no row gives it."""
        return self._value(OUTSIDE, column, None, scenario, batch_size) or 0.0

    def part(self, column: str, part: str, scenario: str, batch_size: int) -> float | None:
        """One column of a part in any layer, if the table has it."""
        return self._value(part, column, None, scenario, batch_size)

    def _value(self, part: str, column: str, layer: int | None, scenario: str, batch_size: int) -> float | None:
        places = self._found.get(part)
        if places is None:
            return None
        for where in _from_most_specific(scenario, batch_size, layer):
            values = places.get(where)
            if values is not None and column in values:
                return values[column]
        return None


def _from_most_specific(scenario: str, batch_size: int, layer: int | None) -> Iterable[_Where]:
    for at_scenario in (scenario, None):
        for at_batch in (batch_size, None):
            yield at_scenario, at_batch, layer
            if layer is not None:
                yield at_scenario, at_batch, None
