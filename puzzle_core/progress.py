"""How a stage's function says how far it is; puzzle_core itself shows nothing."""

from collections.abc import Callable

Report = Callable[[int, int], None]
"""Called now and then with the units of work that are done, and with all of them."""


def no_report(done: int, total: int) -> None:
    """The report of a caller that does not want to know."""
