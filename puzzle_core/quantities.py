"""Quantities in text form: a number with a unit, or a share of the parent's value. The unit is required."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*")
LEAST, LARGEST = 1e-30, 1e30


class Quantity(NamedTuple):
    """A value in the kind's base unit, or a share of the parent's value."""

    value: float
    relative: bool


@dataclass(frozen=True)
class _Kind:
    units: dict[str, float]
    example: str
    shares: bool = True

    def __call__(self, text: str) -> Quantity:
        """Parse `text`.

        Raises:
            ValueError: no number, no unit, or a unit of another kind.
        """
        match = _NUMBER.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a number with a unit, for instance {self.example}")
        number, unit = float(match[1]), match[2]
        if number <= 0:
            raise ValueError(f"{text!r} must be above 0")
        if not LEAST <= number <= LARGEST:
            raise ValueError(f"{text!r} is not between {LEAST:g} and {LARGEST:g}: write it in another unit")
        if unit == "%" and self.shares:
            return Quantity(number / 100, relative=True)
        if unit not in self.units:
            known = ", ".join([*(unit or "no unit" for unit in self.units), *(["%"] if self.shares else [])])
            raise ValueError(f"{text!r} has {'the unit ' + repr(unit) if unit else 'no unit'}; use one of: {known}")
        return Quantity(number * self.units[unit], relative=False)

    @property
    def form(self) -> dict[str, Any]:
        """JSON schema for a form: the pattern and examples of values."""
        units = "|".join(map(re.escape, [*self.units, *(["%"] if self.shares else [])]))
        pattern = rf"^{_NUMBER.pattern.replace('(.*?)', f'({units})')}$"
        return {"pattern": pattern, "examples": re.findall("'(.*?)'", self.example)}

    def check(self, value: object) -> str:
        """Return the value as text if it parses. The validator also gets bare numbers, which YAML parses as numbers."""
        self(str(value))
        return str(value)


_BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_PREFIXES = {"G": 1e9, "T": 1e12, "P": 1e15}

parse_bytes = _Kind(_BYTES, "'80GiB' or '60%'")
parse_seconds = _Kind(_SECONDS, "'300ms' or '60%'")
parse_throughput = _Kind({"tok/s": 1.0}, "'6000 tok/s' or '160%'")
parse_share = _Kind({}, "'60%'")
parse_count = _Kind({"": 1.0, "layers": 1.0, "heads": 1.0}, "'49' or '60%'")

# Properties of a device: shares are not allowed.
parse_memory = _Kind(_BYTES, "'80GB'", shares=False)
parse_duration = _Kind(_SECONDS, "'5us'", shares=False)
parse_bandwidth = _Kind({f"{unit}/s": size for unit, size in _BYTES.items()}, "'3.35TB/s'", shares=False)
parse_rate = _Kind(
    {f"{prefix}{what}/s": size for what in ("FLOP", "OP") for prefix, size in _PREFIXES.items()},
    "'989 TFLOP/s'",
    shares=False,
)

parse_parameters = _Kind(
    {"params": 1.0, "kparams": 1e3, "Mparams": 1e6, "Gparams": 1e9, "Bparams": 1e9}, "'8Gparams' or '60%'"
)
_parse_energy = _Kind({"mJ": 1e-3, "J": 1.0, "kJ": 1e3, "Wh": 3.6e3}, "'500mJ' or '60%'")
_COLUMNS = {
    "_us": (parse_seconds, 1e-6),
    "_ms": (parse_seconds, 1e-3),
    "_s": (parse_seconds, 1.0),
    "_bytes": (parse_bytes, 1.0),
    "_bytes_per_token": (parse_bytes, 1.0),
    "_mj": (_parse_energy, 1e-3),
    "_j": (_parse_energy, 1.0),
    "parameters": (parse_parameters, 1.0),
}


def parse_column(column: str, text: str) -> Quantity:
    """A limit on a column of a cost table, in the column's unit. The suffix of the name gives the unit (`energy_mj`).

    Raises:
        ValueError: the text is not a quantity, or it is absolute and the column's name has no unit suffix.
    """
    for ending, (parse, unit) in _COLUMNS.items():
        if column.endswith(ending):
            value, relative = parse(str(text))
            return Quantity(value if relative else value / unit, relative)
    try:
        return parse_share(str(text))
    except ValueError as error:
        known = ", ".join(_COLUMNS)
        raise ValueError(
            f"a limit on {column!r} can only be a share of the parent's ('60%'), for its name ends in no unit "
            f"({known}): found {text!r}"
        ) from error


def column_unit(column: str) -> str:
    """The unit in the suffix of a column's name, for messages."""
    ending = next((ending for ending in _COLUMNS if column.endswith(ending)), "")
    return {"_bytes_per_token": "bytes", "parameters": "params"}.get(ending, ending.removeprefix("_"))
