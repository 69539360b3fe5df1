"""Efficiency factors of a device, from costs measured on it: least squares on logs of computed over measured times.

With a few measurements of one device, the roofline (cost/roofline.py) then speaks for batch sizes, prompts and variants
that were not measured. No torch.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import MeasurementError
from puzzle_core.target import Efficiency, HardwareSpec, TargetSpec
from puzzle_core.work import CostRecord, Timing, Traffic

Vector = NDArray[np.float64]
FACTORS = ("prefill_compute", "decode_compute", "bandwidth", "overhead_us")
STEPS, STEP, LEAST = 60, 1e-4, 1e-4


def calibrate(
    hardware: HardwareSpec, shape: ModelShape, measured: Sequence[tuple[Traffic, CostRecord]]
) -> HardwareSpec:
    """The hardware with the efficiency factors that fit measurements best.

    Every prefill and decode time of every variant, of what lies outside and of the parent counts alike. A factor that
    no measurement depends on stays what it was.

    Args:
        measured: cost records of this device and this parent, each with the traffic that it holds for.

    Raises:
        MeasurementError: nothing was measured, or a measured time is not above 0.
    """
    times = np.array([time for _, record in measured for time in _times(record)])
    if not len(times) or times.min() <= 0:
        raise MeasurementError(
            f"{len(times)} measured times, the least {times.min(initial=0.0):g} ms: calibration needs times above 0; "
            "measure at least one traffic that generates two tokens or more"
        )

    def residuals(logs: Vector) -> Vector:
        """Logs of computed over measured times, as many as measured ones."""
        target = TargetSpec(costs="roofline", hardware=_with(hardware, logs))
        computed = [roofline(shape, _variants(record), traffic, target) for traffic, record in measured]
        return np.asarray(np.log(np.array([time for record in computed for time in _times(record)]) / times))

    start = [max(LEAST, getattr(hardware.efficiency, name)) for name in FACTORS]
    return _with(hardware, _fit(residuals, _bounded(np.log(start))))


def mean_error(computed: CostRecord, measured: CostRecord) -> float:
    """Mean absolute log ratio of the times of two records of the same variants: about their mean relative error."""
    pairs = zip(_times(computed), _times(measured), strict=True)
    logs = [abs(math.log(ours / theirs)) for ours, theirs in pairs]
    return sum(logs) / len(logs)


def _fit(residuals: Callable[[Vector], Vector], start: Vector) -> Vector:
    """Levenberg-Marquardt with a numerical Jacobian: steps that do not help are taken back and damped more."""
    point, values, damping = start, residuals(start), 1e-2
    for _ in range(STEPS):
        jacobian = np.stack([(residuals(point - STEP * unit) - values) / -STEP for unit in np.eye(len(point))], axis=1)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.eye(len(point)), -jacobian.T @ values)
        tried = _bounded(point + step)
        there = residuals(tried)
        if there @ there < values @ values:
            point, values, damping = tried, there, damping / 3
        else:
            damping *= 5
        if damping > 1e9:
            break
    return point


def _bounded(logs: Vector) -> Vector:
    """Shares between LEAST and 1; the overhead is above LEAST microseconds and has no upper bound."""
    most = np.array([0.0, 0.0, 0.0, np.inf])
    return np.asarray(np.clip(logs, math.log(LEAST), most))


def _with(hardware: HardwareSpec, logs: Vector) -> HardwareSpec:
    factors = dict(zip(FACTORS, np.exp(logs).tolist(), strict=True))
    return hardware.model_copy(update={"efficiency": Efficiency(**factors)})


def _variants(record: CostRecord) -> list[Variant]:
    return [Variant.parse(name) for name in record.variants]


def _times(record: CostRecord) -> list[float]:
    variants = [record.variants[name] for name in sorted(record.variants)]
    timings: list[Timing] = [*variants, record.outside, record.parent]
    return [time for timing in timings for time in (timing.prefill_ms, timing.decode_ms)]
