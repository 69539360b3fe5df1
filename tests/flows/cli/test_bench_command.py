"""`puzzle bench`: parent against child in each engine, as a table, raw figures and a plot."""

import csv
import os
import statistics

import pytest

from flows.cli.main import main
from puzzle_core.architecture import Architecture
from puzzle_core.bench.bench_record import BenchRecord
from puzzle_core.engines import ENGINES
from puzzle_core.sizes import architecture_parameters, kv_entries
from tests import toy_engine
from tests.conftest import MIXED
from tests.puzzle_core.export.conftest import STDLIB

SHALLOW = ("attn:kv4+ffn:i512",) * 2 + ("attn:no_op+ffn:no_op",) * 6


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run `puzzle bench` in an empty directory: its exit code, and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = main(["bench", *map(str, arguments), "--rounds", "3"])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def shallow(tmp_path):
    """A child of the example's parent with a quarter of its layers, as far as a config goes."""
    from puzzle_core.export.source import RandomSource
    from puzzle_core.model.checkpoint import write_checkpoint
    from puzzle_core.model.child import write_description
    from puzzle_core.model.parent import Parent
    from puzzle_core.spec import ParentSpec

    out, architecture = tmp_path / "shallow", Architecture.parse(SHALLOW)
    out.mkdir()
    write_checkpoint(out, ((t.name, t.make()) for t in RandomSource(STDLIB, architecture).tensors()))
    write_description(Parent(ParentSpec(path=str(STDLIB))), architecture, "float32", out)
    return out


def faster(record: BenchRecord) -> list[float]:
    """How much faster the child decodes, point by point."""
    rates = [point.decode_tokens_per_s for point in record.points]
    return [child / parent for parent, child in zip(rates[::2], rates[1::2], strict=True)]


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_a_quarter_of_the_layers_is_much_faster_and_everything_is_written(engine, command, shallow, tmp_path):
    if engine == "llama.cpp":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make engines")
    asked = ["--batch", 1, 3, "--context", 16, 100, "--generate", 12, "--out", "out"]
    code, said = command(shallow, "--engine", engine, *asked)
    assert code == 0, said
    record = BenchRecord.read(tmp_path / "out" / "bench.json")
    assert [(p.model, p.batch_size, p.prompt_tokens) for p in record.points[:4]] == [
        ("parent", 1, 16), ("child", 1, 16), ("parent", 1, 100), ("child", 1, 100),
    ]  # fmt: skip
    assert len(record.points) == 8
    assert statistics.median(faster(record)) > 1.5
    assert engine in record.engine
    assert f"in {record.engine}" in said
    assert said.count("time to first token") == 4
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))
    assert [float(row["decode_tokens_per_s"]) for row in rows] == [p.decode_tokens_per_s for p in record.points]
    point = record.points[3]
    assert point.user_tokens_per_s == pytest.approx(11 / point.timing.decode_ms * 1e3)
    assert point.prefill_tokens_per_s == pytest.approx(100 / point.timing.prefill_ms * 1e3)


def test_memory_is_weights_and_cache(command, assemble, parent, tmp_path):
    code, said = command(
        assemble("llama", MIXED), "--batch", 2, "--context", 10, "--generate", 6, "--out", "out", "--dtype", "bfloat16"
    )
    assert code == 0, said
    for point in BenchRecord.read(tmp_path / "out" / "bench.json").points:
        own = Architecture.of_parent(parent.shape)
        found = own if point.model == "parent" else Architecture.parse(MIXED)
        entries = 2 * kv_entries(parent.shape, found, tokens=16)
        assert point.memory_bytes == 2 * (architecture_parameters(parent.shape, found) + entries)


def test_an_engine_that_is_added_runs_a_bench(command, assemble, parent, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "toy", toy_engine.ROW)
    asked = ["--engine", "toy", "--batch", 1, 2, "--context", 8, "--generate", 8, "--out", "out"]
    code, said = command(assemble("llama", MIXED), *asked)
    assert code == 0, said
    record = BenchRecord.read(tmp_path / "out" / "bench.json")
    assert (record.engine, record.target.engine) == ("Toy 1.0", "toy")
    assert len(record.points) == 4
    for point in record.points:
        architecture = Architecture.of_parent(parent.shape) if point.model == "parent" else Architecture.parse(MIXED)
        assert point.timing.prefill_ms == architecture_parameters(parent.shape, architecture) / 1e3


@pytest.mark.skipif("VLLM" not in os.environ, reason="VLLM does not name the interpreter of an environment with vLLM")
def test_vllm_runs_both_in_its_own_environment(command, tmp_path):
    from benchmarks.engines import CASES, PARENTS, write_child, write_parent

    parent = write_parent(tmp_path / "parent", *PARENTS.get("", ("llama", {})))
    blocks = CASES["mixed, no linear, attention first"]
    child = write_child(parent, Architecture.parse(blocks), tmp_path / "child")
    asked = ["--batch", 2, "--context", 32, "--generate", 12, "--out", "out"]
    code, said = command(child, "--engine", "vllm", "--python", os.environ["VLLM"], *asked)
    assert code == 0, said
    record = BenchRecord.read(tmp_path / "out" / "bench.json")
    assert record.engine.startswith("vLLM")
    assert all(point.timing.decode_ms > 0 for point in record.points)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm"], "name its interpreter with --python"),
        (["--engine", "vllm", "--python", "/no/python"], "--python /no/python cannot be run"),
        (["--context", "120", "--generate", "9"], "the context of the model holds 128"),
        (["--gguf-type", "q8_0"], "--gguf-type is of --engine llama.cpp"),
        (["--generate", "1"], "leave nothing to decode"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message, command, assemble, tmp_path):
    code, said = command(assemble("llama", ("attn:kv4+ffn:i48",) * 5), *arguments, "--out", "out", *_small(arguments))
    assert (code, message in said) == (1, True), said
    assert not (tmp_path / "out").exists()


def _small(arguments: list[str]) -> list[str]:
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return [
        x for name, value in {"--context": "8", "--generate": "8"}.items() if name not in given for x in (name, value)
    ]


def test_a_missing_child_is_an_error_and_an_existing_directory_wrong_usage(command, assemble, tmp_path):
    (tmp_path / "out").mkdir()
    code, printed = command(assemble("llama", MIXED), "--out", "out")
    assert (code, '--out. "out" already exists' in printed) == (2, True)
    code, printed = command("nothing", "--out", "new")
    assert (code, "neither a directory here nor a key" in printed) == (1, True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", "0"),
        ("--context", "-1"),
        ("--generate", "x"),
        ("--threads", "0"),
        ("--rounds", "2"),
        ("--engine", "x"),
    ],
)
def test_values_out_of_range_are_wrong_usage(option, value, capsys, tmp_path):
    code = main(["bench", str(tmp_path), "--out", str(tmp_path / "out"), option, value])
    assert (code, option in capsys.readouterr().err) == (2, True)
    assert not (tmp_path / "out").exists()
