"""The account of a run: device-seconds that its tasks have computed, and its end when the budget is used up.

A task charges its account after every step of a training, and at its end. Accounts are those of this process, where
tasks of a run are threads; processes of GKD that are started from here are charged here.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

from puzzle_core.compute_slots import held_seconds
from puzzle_core.distill.loop import OVER_BUDGET
from puzzle_core.errors import BudgetError
from puzzle_core.spec import BudgetSpec

HOUR_S = 3600.0
_spent_s: defaultdict[str, float] = defaultdict(float)  # device-seconds by account
_lock = threading.Lock()
_thread = threading.local()


class Meter:
    """What the computation of one artifact has taken so far, in the thread that made this."""

    def __init__(self, devices: int, account: str | None, budget: BudgetSpec | None):
        """Begin.

        Args:
            devices: how many GPUs or cores compute.
            account: the run's; none of a run without a budget.
            budget: of the run.
        """
        self.devices, self._account, self._budget = devices, account, budget
        self._begun_s, self._held_s, self._charged_s = time.monotonic(), held_seconds(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the computation began."""
        return time.monotonic() - self._begun_s

    @property
    def device_seconds(self) -> float:
        """Seconds of computing times devices; a task that took no turns with others has computed all the time."""
        return (held_seconds() - self._held_s or self.seconds) * self.devices

    def over(self) -> bool:
        """Charge what was computed since the last call, and say whether the run's budget is used up."""
        if self._account is None or self._budget is None:
            return False
        now_s = self.device_seconds
        with _lock:
            _spent_s[self._account] += max(0.0, now_s - self._charged_s)
            self._charged_s = max(now_s, self._charged_s)
            return _spent_s[self._account] >= self._budget.hours * HOUR_S

    def check(self) -> None:
        """As `over`, and stop.

        Raises:
            BudgetError: the budget is used up.
        """
        if self.over():
            raise BudgetError(OVER_BUDGET)


@contextlib.contextmanager
def metered(devices: int, account: str | None, budget: BudgetSpec | None) -> Iterator[Meter]:
    """Measure a computation of this thread, which is charged to the run's account.

    Raises:
        BudgetError: the budget is used up before it begins.
    """
    _thread.meter = meter = Meter(devices, account, budget)
    meter.check()
    try:
        yield meter
        meter.over()
    finally:
        _thread.meter = None


def over_budget() -> bool:
    """Whether the budget of the computation in this thread is used up."""
    meter: Meter | None = getattr(_thread, "meter", None)
    return meter is not None and meter.over()


def spent_hours(account: str | None) -> float:
    """Device-hours that a run's tasks have computed in this process."""
    return _spent_s[account] / HOUR_S if account else 0.0
