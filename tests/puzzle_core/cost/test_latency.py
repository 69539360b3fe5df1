"""Measured times on a clock that ticks once for every parameter that a forward pass uses: a variant's are its own."""

import pytest
import torch

from puzzle_core.architecture import Architecture, Variant
from puzzle_core.cost import latency, measuring
from puzzle_core.cost.measuring import hardware_name, timing_of
from puzzle_core.device import available_cores
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.model.child import random_child
from puzzle_core.sizes import architecture_parameters, outside_parameters, variant_size
from puzzle_core.spec import TargetSpec
from puzzle_core.work import CostWork, TimingWork, Traffic
from tests.conftest import MIXED

TARGET = TargetSpec(device="cpu", rounds=3, dtype="float32")
VARIANTS = tuple(map(Variant.parse, ("attn:kv1", "attn:linear", "ffn:i12", "ffn:linear")))


def work(variants=VARIANTS, generated_tokens=3):
    traffic = Traffic(prompt_tokens=5, generated_tokens=generated_tokens, batch_size=2)
    return CostWork(shape="s", variants=variants, traffic=traffic, target=TARGET, hardware="abacus")


@pytest.mark.parametrize("stack_bytes", [latency.STACK_BYTES, 1], ids=["in every layer", "in one layer"])
def test_a_variant_takes_its_own_time_and_the_rest_is_outside(ticking, parent, monkeypatch, stack_bytes):
    monkeypatch.setattr(latency, "STACK_BYTES", stack_bytes)
    record = latency.measure_costs(work(), parent)
    assert record.variants.keys() == set(map(str, VARIANTS))
    for variant in VARIANTS:
        parameters = variant_size(parent.shape, variant).parameters
        assert record.variants[str(variant)].prefill_ms == pytest.approx(parameters)
        assert record.variants[str(variant)].decode_ms == pytest.approx(2 * parameters)
    assert record.outside.prefill_ms == pytest.approx(outside_parameters(parent.shape))
    assert (record.hardware, record.rounds) == ("abacus", 3)


def test_variants_and_outside_add_up_to_the_parent(ticking, parent):
    own = parent.shape.largest_block
    record = latency.measure_costs(work((own.attention, own.ffn)), parent)
    for phase in ("prefill_ms", "decode_ms"):
        blocks = parent.shape.layers * sum(getattr(timing, phase) for timing in record.variants.values())
        assert getattr(record.parent, phase) == pytest.approx(blocks + getattr(record.outside, phase))


def test_whole_children_take_the_time_of_all_their_blocks(ticking, parent):
    architectures = {"parent": Architecture.of_parent(parent.shape), "child": Architecture.parse(MIXED)}
    asked = TimingWork(
        shape="s", architectures=tuple(architectures.items()), traffic=work().traffic, target=TARGET, hardware="abacus"
    )
    record = latency.time_architectures(asked, parent)
    for name, architecture in architectures.items():
        expected = architecture_parameters(parent.shape, architecture)
        assert record.models[name].prefill_ms == pytest.approx(expected)


def test_one_generated_token_needs_no_decoding(ticking, parent):
    record = latency.measure_costs(work(generated_tokens=1), parent)
    assert {timing.decode_ms for timing in record.variants.values()} == {0.0}


def test_timings_are_reported_those_of_the_warm_up_too(ticking, parent):
    seen = []
    latency.measure_costs(work(VARIANTS[:1]), parent, report=lambda *progress: seen.append(progress))
    assert seen == [(done, 4 * 3) for done in range(1, 13)]


def test_a_time_that_drowns_in_noise_is_refused(parent, monkeypatch):
    monkeypatch.setattr(latency, "_now", lambda _: 0.0)
    with pytest.raises(MeasurementError, match=r"measured time of attn:kv1 is not positive.*raise target\.rounds"):
        latency.measure_costs(work(VARIANTS[:1]), parent)


def test_real_times_are_positive(parent):
    models = {"child": random_child(parent, Architecture.parse(MIXED), torch.float32, torch.device("cpu"))}
    times = latency.time_models(models, work().traffic, TARGET)["child"]
    assert [len(times["prefill"]), len(times["decode"])] == [3, 3]
    assert min(times["prefill"] + times["decode"]) > 0


def test_decoding_starts_from_a_cache_of_the_right_length(parent):
    model = random_child(parent, Architecture.parse(MIXED), torch.float32, torch.device("cpu"))
    cache = latency._filled_cache(model, 2, 7)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 7, 4), (2, 4, 7, 4)]


def test_medians_and_spreads():
    timing = timing_of({"prefill": [1.0, 2.0, 3.0, 100.0, 2.0], "decode": [0.0] * 5})
    assert (timing.prefill_ms, timing.decode_ms, timing.decode_spread) == (2.0, 0.0, 0.0)
    assert timing.prefill_spread > 1


def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(SpecError, match="sees no GPU here"):
        hardware_name(TargetSpec(device="cuda"))


def test_a_measurement_names_the_machine_and_what_it_runs(monkeypatch):
    target = TargetSpec(device="cpu")
    here = hardware_name(target)
    assert f"torch {torch.__version__}" in here
    assert f"{available_cores()} cores" in here
    names = {here}
    for name, value in (("available_cores", lambda: 999), ("memory_bytes", lambda: 2.0**50)):
        monkeypatch.setattr(measuring, name, value)
        names.add(hardware_name(target))
    monkeypatch.setattr(torch, "__version__", "1.0")
    names.add(hardware_name(target))
    assert len(names) == 4
    assert hardware_name(TargetSpec(device="cpu", machine="node 7")) == "node 7"


def test_a_machine_is_named_only_where_it_is_measured():
    with pytest.raises(ValueError, match="machine is given, but costs are imported"):
        TargetSpec(costs="imported", table="table.csv", machine="node 7")
    assert "machine" not in TargetSpec().model_dump()
