"""Fits the factors of a device: to costs measured on it, or to serving speeds that were measured with an engine.

Least squares on logs of computed over measured figures, so that every figure counts by its relative error. Serving
speeds say little of some factors, so each is also held near its start, the more strongly the less they say. No torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.cost.measurements import Measurement
from puzzle_core.cost.roofline import roofline
from puzzle_core.cost.serving import predict
from puzzle_core.errors import MeasurementError
from puzzle_core.target import Efficiency, Fit, HardwareSpec, TargetSpec
from puzzle_core.work import CostRecord, Timing, Traffic

Vector = NDArray[np.float64]
FACTORS = ("compute", "exposed", "bandwidth", "link", "overhead_us", "sequence_us", "pass_us")
SHARES = ("compute", "exposed", "bandwidth", "link")
LEAST, STEP = 1e-4, 1e-4
"""The least value of a factor, and the step in its log for numerical derivatives."""
HELD: dict[str, float] = {"overhead_us": 0.3, "pass_us": 1.0}
HELD_OTHERS = 0.03
"""Weight of a factor's distance from its start in logs, beside errors of rows, where serving speeds are fitted."""
FEWEST_ROWS = 8
"""Serving speeds that a fit needs: half are fitted, half held out."""


def calibrate(
    hardware: HardwareSpec, shape: ModelShape, measured: Sequence[tuple[Traffic, CostRecord]]
) -> HardwareSpec:
    """The hardware with the factors that fit measured costs best.

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

    def errors(efficiency: Efficiency) -> Vector:
        target = TargetSpec(
            costs="roofline", hardware=hardware.model_copy(update={"efficiency": efficiency, "fits": ()})
        )
        computed = [roofline(shape, _variants(record), traffic, target) for traffic, record in measured]
        return np.asarray(np.log(np.array([time for record in computed for time in _times(record)]) / times))

    return hardware.model_copy(update={"efficiency": _fitted(errors, hardware.efficiency)})


class Held(NamedTuple):
    """Errors of rows that were held out: predicted over measured, less 1."""

    errors: Vector

    @property
    def mean(self) -> float:
        """Mean of their sizes."""
        return float(np.abs(self.errors).mean())

    @property
    def largest(self) -> float:
        """The largest of their sizes."""
        return float(np.abs(self.errors).max())


def fit_serving(target: TargetSpec, shapes: Mapping[str, ModelShape], rows: Sequence[Measurement], what: str) -> Fit:
    """Fit factors to every other row, in their order, and compare with the rows between.

    Args:
        shapes: by the model that a row names.
        rows: all of one engine and version, on this device in this precision.
        what: says in the fit what was measured.

    Raises:
        MeasurementError: there are fewer than `FEWEST_ROWS` rows.
        SpecError: a model of the rows does not fit on the device.
    """
    if len(rows) < FEWEST_ROWS:
        raise MeasurementError(
            f"{len(rows)} rows of {target.name} with {target.engine}: a fit needs {FEWEST_ROWS}, for half are held out"
        )
    assert target.hardware, "only hardware with figures has factors"
    hardware: HardwareSpec = target.hardware

    def errors_of(some: Sequence[Measurement]) -> Callable[[Efficiency], Vector]:
        def errors(efficiency: Efficiency) -> Vector:
            tried = hardware.model_copy(update={"efficiency": efficiency, "fits": ()})
            at = target.model_copy(update={"engine_version": None, "hardware": tried})
            return np.array([math.log(predict(row, shapes[row.model], at) / row.value) for row in some])

        return errors

    fitted, held_out = rows[::2], rows[1::2]
    held = {name: HELD.get(name, HELD_OTHERS) for name in FACTORS}
    efficiency = _fitted(errors_of(fitted), hardware.efficiency, held)
    held_errors = Held(np.exp(errors_of(held_out)(efficiency)) - 1)
    contexts = [row.input_tokens + row.output_tokens for row in rows]
    return Fit(
        engine=target.engine,
        version=rows[0].version,
        efficiency=efficiency,
        measurements=what,
        fitted_rows=len(fitted),
        held_out_rows=len(held_out),
        mean_error=round(held_errors.mean, 4),
        largest_error=round(held_errors.largest, 4),
        tensor_parallel=tuple(sorted({row.tensor_parallel for row in rows})),
        contexts=(min(contexts), max(contexts)),
    )


def mean_error(computed: CostRecord, measured: CostRecord) -> float:
    """Mean absolute log ratio of the times of two records of the same variants: about their mean relative error."""
    pairs = zip(_times(computed), _times(measured), strict=True)
    logs = [abs(math.log(ours / theirs)) for ours, theirs in pairs]
    return sum(logs) / len(logs)


def _fitted(
    errors: Callable[[Efficiency], Vector], start: Efficiency, held: Mapping[str, float] | None = None
) -> Efficiency:
    """The factors with the least sum of squared errors, each held near its start by its weight."""
    first = np.log([max(LEAST, getattr(start, name)) for name in FACTORS])
    weights = np.array([held[name] for name in FACTORS]) if held else np.zeros(len(FACTORS))

    def residuals(logs: Vector) -> Vector:
        distances = weights * (logs - first) if held else np.empty(0)
        return np.concatenate([errors(_efficiency(logs)), distances])

    highest = np.array([0.0 if name in SHARES else np.inf for name in FACTORS])
    bounds = np.full(len(FACTORS), math.log(LEAST)), highest
    fit = least_squares(residuals, np.minimum(first, highest), bounds=bounds, method="dogbox", diff_step=STEP)
    return _efficiency(fit.x)


def _efficiency(logs: Vector) -> Efficiency:
    return Efficiency(**{name: float(value) for name, value in zip(FACTORS, np.exp(logs), strict=True)})


def _variants(record: CostRecord) -> list[Variant]:
    return [Variant.parse(name) for name in record.variants]


def _times(record: CostRecord) -> list[float]:
    variants = [record.variants[name] for name in sorted(record.variants)]
    timings: list[Timing] = [*variants, record.outside, record.parent]
    return [time for timing in timings for time in (timing.prefill_ms, timing.decode_ms)]
