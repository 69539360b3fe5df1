"""Serving speeds: the shipped tables against the shipped factors, and how rows are read, fitted and written."""

import math

import pytest

from benchmarks.published_targets import MEASUREMENTS, TARGETS, WITHIN, predict_rows
from flows.cli.main import main
from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.cost.calibrate import fit_serving
from puzzle_core.cost.fit_file import fit_rows
from puzzle_core.cost.measurements import SHAPES, Measurement, read_measurements
from puzzle_core.cost.serving import cache_bytes, largest_batch, on_devices, predict, serve
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.target import Efficiency, load_target

SHAPE = SHAPES["llama3-70b"]
PARENT = Architecture.of_parent(SHAPE)
HEADER = "model,device,engine,version,tensor_parallel,precision,concurrency,input_tokens,output_tokens,"


@pytest.fixture(scope="module")
def shipped():
    """Measured rows beside the figures of the shipped targets."""
    return predict_rows(read_measurements(MEASUREMENTS))[0]


@pytest.fixture(scope="module")
def h100():
    """The shipped target of an H100 in fp8."""
    return load_target(TARGETS / "h100-80gb-fp8.yaml")


def mean_error(rows):
    return sum(abs(row.ratio - 1) for row in rows) / len(rows)


def test_held_out_rows_are_predicted(shipped):
    held_out = [row for row in shipped if row.measured.table == "T1" and not row.fitted]
    assert len(held_out) == 62
    assert sum(abs(row.ratio - 1) <= WITHIN for row in held_out) >= 0.95 * len(held_out)
    assert mean_error(held_out) < 0.08


def test_models_and_numbers_of_devices_that_no_factor_saw_are_predicted(shipped):
    others = [row for row in shipped if row.measured.table == "T1b"]
    assert {row.measured.model for row in others} == {"llama3-70b", "llama3-405b", "mistral-7b"}
    assert mean_error(others) < 0.08


def test_continuous_batching_gives_the_time_between_tokens_and_static_does_not(shipped, h100):
    between = [row for row in shipped if row.measured.quantity == "inter_token_latency_ms"]
    assert mean_error(between) < 0.08
    static = [predict(row.measured.model_copy(update={"batching": "static"}), SHAPE, h100) for row in between]
    assert static[-1] < 0.5 * between[-1].measured.value


def test_the_fit_in_a_target_says_the_error_that_the_rows_have(shipped, h100):
    held_out = [
        row for row in shipped if row.measured.table == "T1" and row.measured.device == "h100" and not row.fitted
    ]
    assert h100.fit.held_out_rows == len(held_out)
    assert h100.fit.mean_error == pytest.approx(mean_error(held_out), abs=0.002)


def test_a_fit_finds_the_factors_that_made_the_rows(h100):
    truth = Efficiency(compute=0.5, exposed=0.5, bandwidth=0.7, link=0.4, overhead_us=8, sequence_us=0.4)
    made = h100.model_copy(update={"hardware": h100.hardware.model_copy(update={"efficiency": truth, "fits": ()})})
    rows = []
    for devices, prompt, generated in [
        (devices, *pair)
        for devices in (2, 8)
        for pair in ((128, 128), (128, 4096), (2048, 128), (500, 500), (5000, 500))
    ]:
        row = Measurement(
            model="llama3-70b", device="h100", tensor_parallel=devices, precision="fp8", input_tokens=prompt,
            output_tokens=generated, quantity="output_tokens_per_s", value=1,
        )  # fmt: skip
        rows.append(row.model_copy(update={"value": predict(row, SHAPE, made)}))
    fit = fit_serving(h100, SHAPES, rows, "made up")
    assert fit.mean_error < 0.05
    assert fit.efficiency.link == pytest.approx(truth.link, rel=0.2)
    assert fit.efficiency.bandwidth == pytest.approx(truth.bandwidth, rel=0.2)
    with pytest.raises(MeasurementError, match=r"7 rows .*: a fit needs 8"):
        fit_serving(h100, SHAPES, rows[:7], "made up")


def test_heads_that_devices_hold_twice_take_memory(h100):
    """One KV head on eight devices is no smaller than eight."""
    one = Architecture(layers=(BlockVariant.parse(f"attn:kv1+ffn:i{SHAPE.ffn_width}"),) * SHAPE.layers)
    alone, shared = (
        [cache_bytes(SHAPE, child, on_devices(h100, devices).hardware, 1) for child in (one, PARENT)]
        for devices in (1, 8)
    )
    assert alone[1] == 8 * alone[0]
    assert shared[1] == shared[0]


def test_an_optimistic_reservation_fits_more_sequences(h100):
    hardware = on_devices(h100, 2).hardware
    optimistic = hardware.model_copy(
        update={"serving": hardware.serving.model_copy(update={"reservation": "optimistic"})}
    )
    whole, mean = (largest_batch(SHAPE, PARENT, each, 128, 4096) for each in (hardware, optimistic))
    assert mean == pytest.approx(whole * (128 + 4096) / (128 + 2048), rel=0.02)
    with pytest.raises(SpecError, match=r"1 x NVIDIA L4 have .* and the model takes"):
        serve(SHAPE, PARENT, load_target(TARGETS / "l4.yaml"), 128, 128)


def test_rows_may_have_a_column_per_quantity(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(HEADER + "output_tokens_per_s,time_to_first_token_ms\nllama3-8b,h100,vllm,1,1,fp8,max,10,20,30,\n")
    assert [(row.quantity, row.value, row.concurrency) for row in read_measurements(path)] == [
        ("output_tokens_per_s", 30.0, None)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("llama3-8b,h100,vllm,1,1,fp8,max,10,20,,", "line 2: nothing was measured"),
        (
            "llama3-8b,h100,vllm,1,1,fp8,max,10,20,-3,",
            "line 2: output_tokens_per_s is -3: a measured figure is above 0",
        ),
        ("llama3-8b,h100,vllm,1,1,fp8,some,10,20,3,", "line 2: .*concurrency"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}output_tokens_per_s,time_to_first_token_ms\n{line}\n")
    with pytest.raises(SpecError, match=f"(?s){message}"):
        read_measurements(path)


def test_rows_of_several_devices_need_a_choice(h100):
    with pytest.raises(SpecError, match="the rows are of device h100, h200, l40s: choose one with --device"):
        fit_rows(h100, read_measurements(MEASUREMENTS), table="T1")
    with pytest.raises(SpecError, match="no row is of engine tensorrt-llm and weights fp8, device none"):
        fit_rows(h100, read_measurements(MEASUREMENTS), device="none")


def test_calibrate_writes_the_fit_that_it_prints(tmp_path, capsys):
    """From the file of a user: a device of the table, and an engine that the target has no factors of."""
    path, rows = tmp_path / "target.yaml", tmp_path / "rows.csv"
    path.write_text((TARGETS / "l4.yaml").read_text().replace("engine: tensorrt-llm", "engine: vllm"))
    target = load_target(path)
    lines = []
    for prompt, generated in ((128, 128), (128, 1024), (512, 512), (1024, 128)):
        for concurrency in (1, 16):
            served = serve(SHAPES["llama3-8b"], Architecture.of_parent(SHAPES["llama3-8b"]), target, prompt, generated,
                           batch_size=concurrency)  # fmt: skip
            lines.append(f"llama3-8b,l4,vllm,0.9,1,fp8,{concurrency},{prompt},{generated},{1.2 * served.tokens_per_s}")
    rows.write_text(HEADER + "output_tokens_per_s\n" + "\n".join(lines) + "\n")
    assert main(["calibrate", str(path), "--measurements", str(rows), "--write"]) == 0
    assert "held out: 4 rows" in capsys.readouterr().out
    fit = load_target(path).fit
    assert (fit.engine, fit.version, fit.held_out_rows) == ("vllm", "0.9", 4)
    assert math.isfinite(fit.mean_error)
    assert fit.mean_error < 0.1
    assert path.read_text().startswith("# One NVIDIA L4")


def test_calibrate_wants_one_source(capsys):
    assert main(["calibrate", str(TARGETS / "l4.yaml")]) == 1
    assert "give --measurements FILE, or --spec SPEC" in capsys.readouterr().err
