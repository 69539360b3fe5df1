"""Benches in vLLM, in an environment of its own: the module of the engine `vllm`. bench/vllm_script.py runs there."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from puzzle_core.cost.engine_module import BenchRequest, BenchTimes
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.export.hf import export_hf
from puzzle_core.sizes import DTYPE_BYTES

SCRIPT = Path(__file__).with_name("vllm_script.py")


def bench_models(request: BenchRequest, report: Callable[[str], None]) -> BenchTimes:
    """Time the models of a bench in vLLM: one process loads all of them and measures the whole sweep.

    Raises:
        SpecError: no interpreter is given, or it cannot be run.
        ExportError: a model cannot be written as a DeciLM directory.
        MeasurementError: vLLM failed.
    """
    if request.python is None:
        raise SpecError("vLLM lives in an environment of its own: name its interpreter with --python")
    with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as place:
        directories, weight_bytes = {}, {}
        for name, source in request.sources.items():
            directories[name] = Path(place) / name
            directories[name].mkdir()
            exported = export_hf(source, directories[name], widths="any", dtype=request.target.served_dtype)
            weight_bytes[name] = float(exported.bytes)
        report(f"vLLM measures {len(request.traffics)} batch sizes and contexts in one process")
        answer = _run_script(request.python, request, directories, Path(place) / "answer.json")
    return BenchTimes(
        f"vLLM {answer['version']}", weight_bytes, DTYPE_BYTES[request.target.served_dtype], list(answer["times"])
    )


def _run_script(python: Path, request: BenchRequest, directories: Mapping[str, Path], answer: Path) -> Any:
    """Run the script in the other environment; returns the version of vLLM and the times of every traffic."""
    target = request.target
    content = {
        "directories": {name: str(directory) for name, directory in directories.items()},
        "traffics": [traffic.model_dump() for traffic in request.traffics],
        "dtype": target.served_dtype,
        "threads": target.threads,
        "rounds": target.rounds,
    }
    try:
        process = subprocess.run(
            [python, SCRIPT, answer], input=json.dumps(content), text=True, capture_output=True, check=False
        )
    except OSError as error:
        raise SpecError(f"--python {python} cannot be run ({error.strerror})") from error
    if process.returncode or not answer.exists():
        last = (process.stderr.strip().splitlines() or ["no error output"])[-1]
        raise MeasurementError(f"vLLM in {python} failed with {process.returncode}: {last}")
    return json.loads(answer.read_text())
