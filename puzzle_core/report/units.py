"""Numbers as text for display, bytes in MiB and long times in seconds; no other module converts (DESIGN rule 4)."""

import math
from collections.abc import Callable

NONE = "–"
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_TIMES = ((1e3, "s"), (1.0, "ms"), (1e-3, "µs"))


def number_text(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, thousands separated; powers of ten only for what is very small or large."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def range_text(least: float, most: float | None) -> str:
    """A value between two ends: `0.0031` where they agree in three digits, `under 0.003` from 0, `0.002 to 0.004`."""
    if most is None:
        return f"at least {number_text(least)}"
    if number_text(least) == number_text(most):
        return number_text(most)
    upper = number_text(_outwards(most, math.ceil))
    return f"{number_text(_outwards(least, math.floor))} to {upper}" if least else f"under {upper}"


def _outwards(value: float, rounded: Callable[[float], int]) -> float:
    """A value above 0 rounded up or down to three significant digits."""
    power = 10.0 ** (2 - math.floor(math.log10(value)))
    return rounded(value * power) / power


def count_text(count: float) -> str:
    """A count of parameters or tokens: `51.5 B`, `7.24 M`, `512`."""
    for factor, letter in _COUNTS:
        if abs(count) >= factor:
            return f"{number_text(count / factor)} {letter}"
    return f"{count:,.0f}"


def bytes_text(size_bytes: float) -> str:
    """A number of bytes in the largest binary unit that leaves at least 1."""
    power = min(len(_BYTES) - 1, int(math.log(max(1.0, abs(size_bytes)), 1024)))
    return f"{number_text(size_bytes / 1024**power)} {_BYTES[power]}"


def time_scale(time_ms: float) -> tuple[float, str]:
    """The unit that suits a time, and how many milliseconds it has."""
    return next((scale for scale in _TIMES if abs(time_ms) >= scale[0]), _TIMES[-1] if time_ms else _TIMES[1])


def ms_text(time_ms: float) -> str:
    """A measured or predicted time: `812 µs`, `12.3 ms`, `4.05 s`."""
    scale, unit = time_scale(time_ms)
    return f"{number_text(time_ms / scale)} {unit}"


def duration_text(seconds: float) -> str:
    """How long some work took: `12.3 s`, `4 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return ms_text(seconds * 1e3)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def rate_text(tokens_per_s: float) -> str:
    """Tokens per second."""
    return f"{number_text(tokens_per_s)} tok/s"


def percent_text(share: float) -> str:
    """A share of one."""
    return f"{share * 100:.1f} %"


def signed_percent_text(share: float) -> str:
    """A relative difference, with its sign."""
    return f"{share * 100:+.1f} %"


def times_text(ratio: float) -> str:
    """A ratio to the parent: `1.08x`."""
    return f"{ratio:.2f}x"


def speed_text(ratio: float) -> str:
    """A speed as a ratio to the parent's: `1.52x as fast`."""
    return f"{times_text(ratio)} as fast"


def kept_text(ratio: float) -> str:
    """A quality as a ratio to the parent's: `kept 97.8 %`."""
    return f"kept {percent_text(ratio)}"
