"""Quantities: a number with a unit, or a share of the parent's; never a guess."""

import pytest

from puzzle_core.quantities import parse_bytes, parse_seconds, parse_share, parse_throughput


@pytest.mark.parametrize(
    ("parse", "text", "value", "relative"),
    [
        (parse_bytes, "80GiB", 80 * 2**30, False),
        (parse_bytes, " 1.5 GB ", 1.5e9, False),
        (parse_bytes, "2e3 kB", 2e6, False),
        (parse_bytes, "60%", 0.6, True),
        (parse_seconds, "300ms", 0.3, False),
        (parse_seconds, "2 min", 120, False),
        (parse_throughput, "6000 tok/s", 6000, False),
        (parse_throughput, "160%", 1.6, True),
        (parse_share, "55.5%", 0.555, True),
    ],
)
def test_reads(parse, text, value, relative):
    assert parse(text).value == pytest.approx(value)
    assert parse(text).relative == relative


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_bytes, "80", "no unit; use one of: B, kB, MB"),
        (parse_bytes, "80 gb", "unit 'gb'"),
        (parse_seconds, "80GB", "unit 'GB'; use one of: us, ms"),
        (parse_share, "300ms", "unit 'ms'; use one of: %"),
        (parse_bytes, "0GB", "must be above 0"),
        (parse_bytes, "-1GB", "is not a number with a unit, for instance '80GiB'"),
        (parse_bytes, "much", "is not a number with a unit"),
        (parse_bytes, "nan GB", "is not a number with a unit"),
        (parse_bytes, "", "is not a number with a unit"),
    ],
)
def test_refuses(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
