"""Hardware targets: what a kind of costs needs is asked for, units are never guessed, the shipped ones are whole."""

from pathlib import Path

import pytest
import yaml

from puzzle_core.device_table import DEPLOYMENTS, device_targets, file_text
from puzzle_core.errors import SpecError
from puzzle_core.quantities import parse_bandwidth, parse_duration, parse_memory, parse_rate
from puzzle_core.spec_file import load_spec
from puzzle_core.target import Fit, HardwareSpec, TargetSpec, load_target

SHIPPED = sorted((Path(__file__).parents[2] / "deployments/targets").glob("*.yaml"))
HARDWARE = {
    "device": "Abacus 9",
    "memory": "80GB",
    "bandwidth": "3.35TB/s",
    "peak_rates": {"bfloat16": "989 TFLOP/s"},
}
BITS = {"bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4, "fp4": 4}
ROOFLINE = {"name": "abacus", "costs": "roofline", "hardware": HARDWARE}


@pytest.fixture
def target_file(tmp_path):
    """Writes a target and gives its path."""

    def write(content):
        (tmp_path / "target.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "target.yaml"

    return write


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bandwidth, "3.35TB/s", 3.35e12),
        (parse_bandwidth, "864 GB/s", 864e9),
        (parse_rate, "989 TFLOP/s", 989e12),
        (parse_rate, "4.5 PFLOP/s", 4.5e15),
        (parse_rate, "33 TOP/s", 33e12),
        (parse_memory, "80GB", 80e9),
        (parse_duration, "10us", 1e-5),
    ],
)
def test_figures_are_read_with_their_units(parse, text, value):
    assert parse(text) == pytest.approx((value, False))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("memory", 80, "'80' has no unit; use one of: B, kB"),
        ("memory", "80%", "'80%' has the unit '%'"),
        ("bandwidth", "3.35TB", "'3.35TB' has the unit 'TB'; use one of: B/s"),
        ("peak_rates", {"bfloat16": "989 TB/s"}, "'989 TB/s' has the unit 'TB/s'; use one of: GFLOP/s"),
        ("peak_rates", {"bf16": "989 TFLOP/s"}, "hardware.peak_rates.bf16: unknown key; did you mean 'bfloat16'?"),
        ("bandwith", "1TB/s", "hardware.bandwith: unknown key; did you mean 'bandwidth'?"),
        ("efficiency", {"bandwidth": 1.5}, "hardware.efficiency.bandwidth: "),
        ("weights", "fp5", "hardware.weights: "),
        ("tensor_parallel", 4, "interconnect is missing: tensor_parallel is 4"),
        ("activations", "float32", "peak_rates.float32 is missing: weight products run in the wider of"),
        ("kv_cache", "float32", "peak_rates.float32 is missing: attention products run in the wider of"),
    ],
)
def test_a_wrong_figure_is_said_with_its_place(target_file, key, value, message):
    path = target_file(ROOFLINE | {"hardware": HARDWARE | {key: value}})
    with pytest.raises(SpecError) as caught:
        load_target(path)
    assert str(caught.value).startswith(f"{path} is not a valid target:\n")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"costs": "roofline"}, "costs are roofline, but hardware is missing"),
        ({"costs": "imported"}, "costs are imported, but table is missing"),
        ({"table": "costs.csv"}, "table is given, but costs are measured: set `costs: imported`"),
        ({"hardware": HARDWARE}, "hardware is given, but costs are measured: set `costs: roofline`"),
    ],
)
def test_a_target_has_what_its_kind_of_costs_needs_and_no_more(target_file, parts, message):
    with pytest.raises(SpecError, match=message):
        load_target(target_file(parts))


def test_products_run_in_the_wider_precision_of_their_operands():
    rates = {"bfloat16": "989 TFLOP/s", "fp8": "1979 TFLOP/s"}
    quantised = HardwareSpec(**HARDWARE | {"peak_rates": rates}, weights="int4", activations="bfloat16", kv_cache="fp8")
    assert (quantised.linear_products, quantised.attention_products) == ("bfloat16", "bfloat16")
    small = HardwareSpec(**HARDWARE | {"peak_rates": rates}, weights="fp8", activations="fp8", kv_cache="fp8")
    assert (small.linear_products, small.attention_products) == ("fp8", "fp8")


def test_the_fit_of_the_engine_counts_and_else_what_is_assumed():
    efficiency = {"compute": 0.5, "bandwidth": 0.5}
    fits = [
        Fit(
            engine="vllm", version=version, efficiency=efficiency | {"link": link}, measurements="m", fitted_rows=9,
            held_out_rows=9, mean_error=0.1, largest_error=0.2, tensor_parallel=(1,), contexts=(8, 9),
        ).model_dump()
        for version, link in (("1", 0.1), ("2", 0.2))
    ]  # fmt: skip
    fitted = ROOFLINE | {"hardware": HARDWARE | {"fits": fits}}
    assert TargetSpec(**fitted).fit is None
    assert TargetSpec(**fitted).efficiency == HardwareSpec(**HARDWARE).efficiency
    assert TargetSpec(**fitted, engine="vllm").efficiency.link == 0.2
    assert TargetSpec(**fitted, engine="vllm", engine_version="1").efficiency.link == 0.1
    with pytest.raises(ValueError, match=r"no fit of vllm 3 \(fits: vllm 1, vllm 2\)"):
        TargetSpec(**fitted, engine="vllm", engine_version="3")


def test_usable_memory_is_a_share_of_all_devices_less_what_the_engine_keeps():
    link = {"bandwidth": "1GB/s", "latency": "1us"}
    serving = {"memory_share": 0.5, "reserved": "10GB"}
    hardware = HardwareSpec(**HARDWARE, tensor_parallel=2, pipeline_parallel=3, interconnect=link, serving=serving)
    assert hardware.usable_bytes == 6 * 30e9


def test_a_cost_table_is_relative_to_the_file(target_file, tmp_path):
    (tmp_path / "costs.csv").write_text("")
    assert load_target(target_file({"costs": "imported", "table": "costs.csv"})).table == str(tmp_path / "costs.csv")


def test_files_that_are_no_targets_are_named(tmp_path):
    (tmp_path / "target.yaml").write_text("- a list")
    with pytest.raises(SpecError, match=r"target\.yaml holds no keys: a target starts with `name:`"):
        load_target(tmp_path / "target.yaml")
    with pytest.raises(SpecError, match=r"cannot read the target .*none"):
        load_target(tmp_path / "none")


def test_a_spec_names_a_target_file_beside_it(target_file, tmp_path):
    target_file(ROOFLINE)
    spec = tmp_path / "run.yaml"
    least = {"parent": {"path": "owner/name"}, "scenario": {"limits": {"memory": "60%"}}}
    spec.write_text(yaml.safe_dump(least | {"target": "target.yaml"}))
    assert load_spec(spec).target == TargetSpec.model_validate(ROOFLINE)
    changed = load_spec(spec, ("target.hardware.memory=40GB",)).target
    assert changed.hardware is not None
    assert changed.hardware.memory == "40GB"
    elsewhere = target_file({"name": "other"}).rename(tmp_path / "other.yaml")
    target_file(ROOFLINE)
    assert load_spec(spec, (f"target={elsewhere}",)).target.name == "other"
    with pytest.raises(SpecError, match="cannot read the target"):
        load_spec(spec, ("target=nowhere.yaml",))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_targets_say_where_every_figure_comes_from(path):
    target = load_target(path)
    assert target.name == path.stem
    if target.hardware is None:
        assert target.costs == "measured"
        return
    hardware = target.hardware
    figures = {"memory", "bandwidth", "peak_rates"} | ({"interconnect"} if hardware.interconnect else set())
    assert hardware.sources.keys() == figures
    assert all("data sheet" in text or "whitepaper" in text or "PCIe" in text for text in hardware.sources.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_rates_are_dense(path):
    """Halving the bits of an operand at most quadruples the rate; a sparse rate beside a dense one stands out."""
    if path.stem == "gaudi3":
        pytest.skip("its matrix engines are as fast in 16 bits as in 8")
    hardware = load_target(path).hardware
    rates = hardware.peak_rates.model_dump(exclude_none=True) if hardware else {}
    tensor = {name: parse_rate(text).value for name, text in rates.items() if name != "float32"}
    for name, rate in tensor.items():
        for other, slower in tensor.items():
            if BITS[other] == 2 * BITS[name] and (name, other) != ("int8", "bfloat16"):
                assert 1.9 * slower < rate < 4.1 * slower
            if BITS[other] == BITS[name] == 16:
                assert rate == slower


def test_the_shipped_targets_are_those_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs/targets.md").read_text()
    assert len(SHIPPED) >= 9
    assert [path.stem for path in SHIPPED if f"`{path.stem}`" not in page] == []


def test_a_target_says_how_far_its_costs_are_from_measurements():
    h100 = load_target(Path(__file__).parents[2] / "deployments/targets/h100-80gb-fp8.yaml")
    assert "tensorrt-llm 0.17" in h100.accuracy
    assert "of 18 held-out measurements" in h100.accuracy
    sixteen = h100.model_copy(update={"hardware": h100.hardware.model_copy(update={"tensor_parallel": 16})})
    assert "none is of 16 devices like this (tensor_parallel 1, 2, 4, 8)" in sixteen.accuracy
    assert TargetSpec(**ROOFLINE).accuracy.endswith("not compared with measurements, factors are assumed")
    assert TargetSpec().accuracy == ""


def test_the_number_of_devices_is_set_once(target_file, tmp_path):
    """The target's drives the form too: variants that so many devices cannot share are left out of the request."""
    link = {"bandwidth": "1GB/s", "latency": "1us"}
    target_file(ROOFLINE | {"hardware": HARDWARE | {"tensor_parallel": 4, "interconnect": link}})
    spec = tmp_path / "run.yaml"
    least = {"parent": {"path": "owner/name"}, "scenario": {"limits": {"memory": "60%"}}, "target": "target.yaml"}
    spec.write_text(yaml.safe_dump(least))
    request = load_spec(spec).request
    assert request.constraints.tensor_parallel == 4
    assert request.served_on is not None
    assert request.served_on.devices == "4 x Abacus 9"
    with pytest.raises(SpecError, match=r"constraints\.tensor_parallel is 2 and target\.hardware\.tensor_parallel 4"):
        load_spec(spec, ("constraints.tensor_parallel=2",))


def test_files_of_the_table_of_devices_are_those_that_it_makes():
    table = device_targets(DEPLOYMENTS / "devices.yaml")
    assert len(table) >= 10
    for name, content in table.items():
        path = DEPLOYMENTS / "targets" / f"{name}.yaml"
        assert path.read_text() == file_text(name, content, path)
