"""Fits the efficiency factors of a device to costs measured on it: least squares on logs of computed / measured times.

After a few measurements of a device, the roofline (cost/roofline.py) predicts times of batch sizes, prompts and
variants that were not measured. No torch.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import MeasurementError
from puzzle_core.target import Efficiency, HardwareSpec, TargetSpec
from puzzle_core.work import CostRecord, Timing, Traffic

Vector = NDArray[np.float64]
FACTORS = ("prefill_compute", "decode_compute", "bandwidth", "overhead_us")
LEAST, STEP = 1e-4, 1e-4
"""The least value of a factor, and the step in its log for numerical derivatives."""


def calibrate(
    hardware: HardwareSpec, shape: ModelShape, measured: Sequence[tuple[Traffic, CostRecord]]
) -> HardwareSpec:
    """The hardware with the efficiency factors that fit the measurements best.

    Every prefill and decode time of every variant, of what lies outside and of the parent has the same weight. A factor
    that no measurement depends on does not change.

    Args:
        measured: cost records of this device and this parent, each with the traffic that it holds for.

    Raises:
        MeasurementError: there are no measured times, or one is not above 0.
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

    bounds = np.full(len(FACTORS), math.log(LEAST)), np.array([0.0, 0.0, 0.0, np.inf])
    start = np.log([max(LEAST, getattr(hardware.efficiency, name)) for name in FACTORS])
    fit = least_squares(residuals, start, bounds=bounds, method="dogbox", diff_step=STEP)
    return _with(hardware, fit.x)


def mean_error(computed: CostRecord, measured: CostRecord) -> float:
    """Mean absolute log ratio of the times of two records of the same variants: about their mean relative error."""
    pairs = zip(_times(computed), _times(measured), strict=True)
    logs = [abs(math.log(ours / theirs)) for ours, theirs in pairs]
    return sum(logs) / len(logs)


def _with(hardware: HardwareSpec, logs: Vector) -> HardwareSpec:
    factors = dict(zip(FACTORS, np.exp(logs).tolist(), strict=True))
    return hardware.model_copy(update={"efficiency": Efficiency(**factors)})


def _variants(record: CostRecord) -> list[Variant]:
    return [Variant.parse(name) for name in record.variants]


def _times(record: CostRecord) -> list[float]:
    variants = [record.variants[name] for name in sorted(record.variants)]
    timings: list[Timing] = [*variants, record.outside, record.parent]
    return [time for timing in timings for time in (timing.prefill_ms, timing.decode_ms)]
