"""Numbers as people read them."""

import pytest

from puzzle_core.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (0.0312, "0.0312"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (-0.5, "-0.500"),
        (2e-6, "2.00e-06"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert units.number_text(value) == text


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (0.0, 0.0, "0"),
        (0.00312, 0.00312, "0.00312"),
        (0.0031204, 0.0031209, "0.00312"),
        (0.0, 0.0029991, "under 0.00300"),
        (0.0021239, 0.0038901, "0.00212 to 0.00390"),
        (1234.5, 5678.9, "1,230 to 5,680"),
        (2.0, None, "at least 2.00"),
        (0.0, 3.331e-6, "under 3.34e-06"),
    ],
)
def test_a_range_is_rounded_outwards(least: float, most: float | None, text: str) -> None:
    assert units.range_text(least, most) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.00 KiB"),
        (1.5 * 2**30, "1.50 GiB"),
        (80 * 2**40, "80.0 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_bytes_are_binary_units(value: float, text: str) -> None:
    assert units.bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 ms"), (0.8123, "812 µs"), (12.34, "12.3 ms"), (4050, "4.05 s"), (-19, "-19.0 ms")]
)
def test_milliseconds(value: float, text: str) -> None:
    assert units.ms_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "40.0 ms"), (12.3, "12.3 s"), (245, "4 min 05 s"), (12_000, "3 h 20 min")]
)
def test_durations(value: float, text: str) -> None:
    assert units.duration_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(512, "512"), (7.24e6, "7.24 M"), (51.5e9, "51.5 B"), (65_536, "65.5 k")])
def test_counts(value: float, text: str) -> None:
    assert units.count_text(value) == text


def test_ratios_to_the_parent() -> None:
    assert units.speed_text(1.519) == "1.52x as fast"
    assert units.kept_text(0.9784) == "kept 97.8 %"
    assert units.signed_percent_text(0.042) == "+4.2 %"
    assert units.rate_text(6420.4) == "6,420 tok/s"
