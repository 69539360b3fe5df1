"""Rules: constraints on a choice that depend on neither scores nor costs.

Legend: L layers, J options of a layer; a choice is a tuple of L option indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from puzzle_core.errors import CoverageError, SpecError

Indices = NDArray[np.int64]

UNCOUNTED = -1
"""The group of an option that an AtMostDistinct rule does not count."""


@dataclass(frozen=True, eq=False)
class AtMostDistinct:
    """At most so many different groups may appear in a choice: three FFN widths, or one number of KV heads.

    Attributes:
        groups: per layer the group of every option, (J,) whole numbers; UNCOUNTED for an option that does not count.
    """

    name: str
    groups: tuple[Indices, ...]
    at_most: int

    def __post_init__(self) -> None:
        columns = []
        for groups in self.groups:
            array = np.array(groups, dtype=np.int64)
            array.setflags(write=False)
            columns.append(array)
        object.__setattr__(self, "groups", tuple(columns))

    def count(self, choice: Sequence[int]) -> int:
        """How many different groups a choice has."""
        chosen = {int(groups[index]) for groups, index in zip(self.groups, choice, strict=True)}
        return len(chosen - {UNCOUNTED})

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether the choice has no more groups than allowed."""
        return self.count(choice) <= self.at_most

    def restricted(self, kept: Sequence[Sequence[int]]) -> Self:
        """The same rule where only these options of each layer are left."""
        return replace(self, groups=tuple(groups[rows] for groups, rows in zip(self.groups, kept, strict=True)))

    def check(self, options: tuple[tuple[str, ...], ...], parent: Sequence[int]) -> None:
        """Refuse a rule that does not belong to these options."""
        if len(self.groups) != len(options):
            raise CoverageError(f"rule {self.name!r} covers {len(self.groups)} layers of {len(options)}")
        for layer, (groups, ids) in enumerate(zip(self.groups, options, strict=True)):
            if groups.shape != (len(ids),):
                raise CoverageError(
                    f"rule {self.name!r} has groups of shape {groups.shape} for the {len(ids)} options of layer {layer}"
                )
            if groups.min() < UNCOUNTED:
                raise SpecError(
                    f"rule {self.name!r} gives an option of layer {layer} the group {groups.min()}: groups count from "
                    f"0, and {UNCOUNTED} is an option that does not count"
                )
        if self.at_most < 0:
            raise SpecError(f"rule {self.name!r} allows {self.at_most} different groups: allow 0 or more")


@dataclass(frozen=True)
class AllOrNone:
    """All of these options are chosen or none: one variant that stands for several layers.

    By convention its first option carries score and costs, and the others carry none.

    Attributes:
        members: (layer, option index), of different layers.
    """

    name: str
    members: tuple[tuple[int, int], ...]

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether the choice has all members or none."""
        return len({choice[layer] == option for layer, option in self.members}) == 1

    def restricted(self, kept: Sequence[Sequence[int]]) -> Self:
        """The same rule where only these options of each layer are left, and all of its members are."""
        return replace(self, members=tuple((layer, kept[layer].index(option)) for layer, option in self.members))

    def check(self, options: tuple[tuple[str, ...], ...], parent: Sequence[int]) -> None:
        """Refuse a rule that does not belong to these options."""
        layers = [layer for layer, _ in self.members]
        if len(layers) < 2 or len(set(layers)) < len(layers):
            raise SpecError(
                f"rule {self.name!r} ties options of layers {layers}: it needs two layers or more, each of them once"
            )
        for layer, option in self.members:
            if not 0 <= layer < len(options) or not 0 <= option < len(options[layer]):
                raise SpecError(f"rule {self.name!r} names option {option} of layer {layer}, which is not there")
            if option == parent[layer]:
                raise SpecError(
                    f"rule {self.name!r} ties {options[layer][option]!r} of layer {layer}, the parent's own: it must "
                    "stay free to be chosen by itself"
                )


Rule = AtMostDistinct | AllOrNone


def check_rules(rules: tuple[Rule, ...], options: tuple[tuple[str, ...], ...], parent: Sequence[int]) -> None:
    """Check each rule, and that no option is tied twice.

    Raises:
        CoverageError: an AtMostDistinct does not have one group per option.
        SpecError: a rule is on options that are not there, ties a parent's own, or ties what another one ties.
    """
    tied: dict[tuple[int, int], str] = {}
    for rule in rules:
        rule.check(options, parent)
        for member in rule.members if isinstance(rule, AllOrNone) else ():
            if member in tied:
                layer, option = member
                raise SpecError(
                    f"rules {tied[member]!r} and {rule.name!r} both tie {options[layer][option]!r} of layer {layer}: "
                    "make one rule of the two, or two options of the one"
                )
            tied[member] = rule.name


def tied_options(rules: Sequence[Rule], sizes: Sequence[int]) -> list[NDArray[np.bool_]]:
    """Per layer, which options are members of an AllOrNone, (J,)."""
    tied = [np.zeros(size, dtype=bool) for size in sizes]
    for rule in rules:
        for layer, option in rule.members if isinstance(rule, AllOrNone) else ():
            tied[layer][option] = True
    return tied


def drop_broken(rules: Sequence[Rule], kept: Sequence[Sequence[int] | Indices]) -> list[Indices]:
    """The options kept, less the members of every AllOrNone that has lost one."""
    left = [{int(row) for row in rows} for rows in kept]
    for rule in rules:
        if isinstance(rule, AllOrNone) and not all(option in left[layer] for layer, option in rule.members):
            for layer, option in rule.members:
                left[layer].discard(option)
    return [np.array([row for row in rows if row in left[layer]], dtype=np.int64) for layer, rows in enumerate(kept)]
