"""Calibration: factors are found again from costs that they made, and measured costs of this machine are fitted."""

import random
import statistics

import pytest

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.cost import latency
from puzzle_core.cost.calibrate import FACTORS, calibrate, mean_error
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import MeasurementError
from puzzle_core.target import Efficiency, HardwareSpec, TargetSpec
from puzzle_core.work import CostRecord, CostWork, Timing, Traffic

SHAPE = ModelShape(
    family="llama", layers=4, hidden=1024, heads=16, kv_heads=8, head_dim=64, ffn_width=4096, vocabulary=32000,
    tied_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, qk_norm=False, max_positions=4096,
)  # fmt: skip
VARIANTS = tuple(map(Variant.parse, ("attn:kv8", "attn:kv2", "attn:linear", "ffn:i4096", "ffn:i512", "ffn:linear")))
TRAFFICS = [Traffic(prompt_tokens=256, generated_tokens=64, batch_size=batch) for batch in (1, 16, 1024)]
HARDWARE = HardwareSpec(
    device="abacus",
    memory="80GB",
    bandwidth="1TB/s",
    peak_rates={"bfloat16": "100 TFLOP/s"},
    efficiency=Efficiency(compute=0.5, exposed=0.5, bandwidth=0.5, overhead_us=20, sequence_us=1, pass_us=100),
)


def computed(hardware, noise=0.0):
    """Records of all traffics, each time off by a few percent."""
    rng, target = random.Random(0), TargetSpec(costs="roofline", hardware=hardware)

    def off(timing):
        return Timing(
            prefill_ms=timing.prefill_ms * (1 + rng.gauss(0, noise)),
            decode_ms=timing.decode_ms * (1 + rng.gauss(0, noise)),
        )

    found = []
    for traffic in TRAFFICS:
        record = roofline(SHAPE, VARIANTS, traffic, target)
        variants = {name: off(timing) for name, timing in record.variants.items()}
        update = {"variants": variants, "outside": off(record.outside), "parent": off(record.parent)}
        found.append((traffic, record.model_copy(update=update)))
    return found


@pytest.mark.parametrize("factors", [(0.7, 0.9, 0.9, 0.6, 4, 0.5, 300), (0.2, 0.3, 0.4, 0.6, 60, 2, 900)])
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.03, 0.2)])
def test_the_factors_that_made_the_costs_are_found_again(factors, noise, tolerance):
    truth = Efficiency(**dict(zip(FACTORS, factors, strict=True)))
    found = calibrate(HARDWARE, SHAPE, computed(HARDWARE.model_copy(update={"efficiency": truth}), noise)).efficiency
    for name in FACTORS:  # one device has no link, and its share stays
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=tolerance, abs=4 * noise)


def test_nothing_but_the_factors_changes():
    found = calibrate(HARDWARE, SHAPE, computed(HARDWARE))
    assert found.model_copy(update={"efficiency": HARDWARE.efficiency}) == HARDWARE
    assert found.efficiency.bandwidth == pytest.approx(0.5, rel=1e-3)


def test_a_factor_that_nothing_depends_on_stays_as_it_was():
    small = [(traffic, record) for traffic, record in computed(HARDWARE) if traffic.batch_size == 1]
    asked = HARDWARE.model_copy(update={"efficiency": HARDWARE.efficiency.model_copy(update={"bandwidth": 0.3})})
    found = calibrate(asked, SHAPE, small).efficiency
    assert found.link == pytest.approx(HARDWARE.efficiency.link)
    assert found.bandwidth == pytest.approx(0.5, rel=1e-3)


def test_without_times_there_is_nothing_to_fit():
    with pytest.raises(MeasurementError, match="0 measured times"):
        calibrate(HARDWARE, SHAPE, [])
    no_decoding = Traffic(prompt_tokens=8, generated_tokens=1, batch_size=1)
    record = roofline(SHAPE, VARIANTS, no_decoding, TargetSpec(costs="roofline", hardware=HARDWARE))
    with pytest.raises(MeasurementError, match="the least 0 ms"):
        calibrate(HARDWARE, SHAPE, [(no_decoding, record)])


@pytest.mark.long
def test_a_calibrated_roofline_is_nearer_to_this_machine_than_a_data_sheet(parent):
    """Measured here; the bound is loose, for other work on the machine may stretch any of these times."""
    target = TargetSpec(device="cpu", rounds=3, dtype="float32")
    variants = tuple(map(Variant.parse, ("attn:kv4", "attn:kv1", "ffn:i48", "ffn:i24", "ffn:linear")))
    measured: list[tuple[Traffic, CostRecord]] = []
    for batch in (2, 16):
        traffic = Traffic(prompt_tokens=64, generated_tokens=8, batch_size=batch)
        work = CostWork(shape="s", variants=variants, traffic=traffic, target=target, hardware="here")
        measured.append((traffic, latency.measure_costs(work, parent)))
    sheet = HardwareSpec(
        device="this CPU",
        weights="float32",
        activations="float32",
        kv_cache="float32",
        memory="1GB",
        bandwidth="20GB/s",
        peak_rates={"float32": "50 GFLOP/s"},
    )
    errors = {
        name: statistics.mean(
            mean_error(
                roofline(parent.shape, variants, traffic, TargetSpec(costs="roofline", hardware=hardware)), record
            )
            for traffic, record in measured
        )
        for name, hardware in {"sheet": sheet, "calibrated": calibrate(sheet, parent.shape, measured)}.items()
    }
    assert errors["calibrated"] < 0.6
    assert errors["calibrated"] < errors["sheet"] / 2
