"""Quantities as users write them: a number with a unit, or a share of the parent's. Units are parsed, never guessed."""

import re
from dataclasses import dataclass
from typing import NamedTuple

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*")


class Quantity(NamedTuple):
    """A value in the kind's base unit, or a share of what the parent has."""

    value: float
    relative: bool


@dataclass(frozen=True)
class _Kind:
    units: dict[str, float]
    example: str

    def __call__(self, text: str) -> Quantity:
        """Parse `text`.

        Raises:
            ValueError: no number, no unit, or a unit of another kind.
        """
        match = _NUMBER.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a number with a unit; for instance {self.example}")
        number, unit = float(match[1]), match[2]
        if number <= 0:
            raise ValueError(f"{text!r} must be above 0")
        if unit == "%":
            return Quantity(number / 100, relative=True)
        if unit not in self.units:
            known = ", ".join([*self.units, "%"])
            raise ValueError(f"{text!r} has {'the unit ' + repr(unit) if unit else 'no unit'}; say one of: {known}")
        return Quantity(number * self.units[unit], relative=False)

    def check(self, value: object) -> str:
        """The value as text, if it parses; for use as a validator, to which YAML gives a bare number as a number."""
        self(str(value))
        return str(value)


parse_bytes = _Kind(
    {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "'80GiB' or '60%'",
)
parse_seconds = _Kind({"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}, "'300ms' or '60%'")
parse_throughput = _Kind({"tok/s": 1.0}, "'6000 tok/s' or '160%'")
parse_share = _Kind({}, "'60%'")
