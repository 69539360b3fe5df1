"""Parent against child in one engine: prefill and decode over batch sizes and contexts, in turns (`puzzle bench`).

Weights are random, of the child's shapes and of its parent's, which the child's config knows: speed depends on nothing
else. Times are taken as costs are (cost/latency.py, cost/llama_cpp.py), or by vLLM in an environment of its own.
"""

import contextlib
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from puzzle_core.bench.bench_record import CHILD, PARENT, BenchPoint, BenchRecord
from puzzle_core.cost import latency, llama_cpp
from puzzle_core.cost.llama_engine import engine_version
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import RandomSource, Source
from puzzle_core.formats.block_configs import block_config
from puzzle_core.model.child_config import child_config
from puzzle_core.model.parent import build_model, served_as, torch_dtype
from puzzle_core.sizes import DTYPE_BYTES, kv_entries_per_token
from puzzle_core.spec import TargetSpec
from puzzle_core.work import Timing, Traffic

VLLM_SCRIPT = Path(__file__).with_name("vllm_script.py")

Engine = Literal["torch", "llama.cpp", "vllm"]
Measured = tuple[dict[str, Timing], dict[str, float]]
"""Times, and bytes of weights and cache, by model."""
Measure = Callable[[Traffic], Measured]


class Sweep(NamedTuple):
    """What is tried: every batch size at every context, and so many generated tokens."""

    batch_sizes: Sequence[int]
    contexts: Sequence[int]
    generated_tokens: int


def run(
    directory: Path,
    engine: Engine,
    target: TargetSpec,
    sweep: Sweep,
    python: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> BenchRecord:
    """Compare the child in a directory with its parent, in an engine.

    Args:
        target: device, types, threads and rounds.
        python: for vLLM, the interpreter of an environment that has it.

    Raises:
        SpecError: a context that the model does not have, or an engine that is not here.
        ExportError: the child cannot be written as the engine reads it.
        MeasurementError: the engine failed.
    """
    child = Source(directory)
    longest = max(sweep.contexts) + sweep.generated_tokens
    if longest > child.shape.max_positions:
        raise SpecError(
            f"{max(sweep.contexts)} prompt and {sweep.generated_tokens} generated tokens are asked for, and "
            f"the context of the model holds {child.shape.max_positions}"
        )
    if sweep.generated_tokens < 2:
        raise SpecError(f"{sweep.generated_tokens} generated tokens leave nothing to decode: ask for 2 or more")
    sources = {PARENT: RandomSource(directory), CHILD: RandomSource(directory, child.architecture)}
    points = []
    with _ENGINES[engine](sources, target, sweep, python) as (version, measure):
        for batch, context in itertools.product(sweep.batch_sizes, sweep.contexts):
            traffic = Traffic(prompt_tokens=context, generated_tokens=sweep.generated_tokens, batch_size=batch)
            report(f"batch {batch}, {context} prompt tokens")
            times, memory = measure(traffic)
            for name, timing in times.items():
                points.append(BenchPoint(**traffic.model_dump(), model=name, timing=timing, memory_bytes=memory[name]))
    return BenchRecord(
        engine=version,
        hardware=latency.hardware_name(target),
        target=target,
        architecture=child.architecture,
        points=tuple(points),
    )


@contextlib.contextmanager
def _in_torch(
    sources: Mapping[str, Source], target: TargetSpec, _: Sweep, __: Path | None
) -> Iterator[tuple[str, Measure]]:
    device, dtype, models = latency.target_device(target), torch_dtype(target.dtype), {}
    for name, source in sources.items():
        blocks = [block_config(block) for block in source.architecture.layers]
        model = build_model(child_config(source.config, blocks), None)
        models[name] = served_as(model, dtype, device).requires_grad_(False)
    weights = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}

    def measure(traffic: Traffic) -> Measured:
        times = latency.time_models(models, traffic, target)
        return _timings(times), _with_cache(weights, sources, traffic, DTYPE_BYTES[target.dtype])

    yield f"torch {torch.__version__}", measure


@contextlib.contextmanager
def _in_llama_cpp(
    sources: Mapping[str, Source], target: TargetSpec, _: Sweep, __: Path | None
) -> Iterator[tuple[str, Measure]]:
    with llama_cpp.exported(sources, target) as files:

        def measure(traffic: Traffic) -> Measured:
            with llama_cpp.opened(files, traffic, target) as models:
                times = llama_cpp.time_models(models, traffic, target)
                weights = {name: model.weight_bytes for name, model in models.items()}
            return _timings(times), _with_cache(weights, sources, traffic, llama_cpp.CACHE_BYTES)

        yield f"{engine_version()}, weights in {llama_cpp.gguf_type(target)}", measure


@contextlib.contextmanager
def _in_vllm(
    sources: Mapping[str, Source], target: TargetSpec, sweep: Sweep, python: Path | None
) -> Iterator[tuple[str, Measure]]:
    """Both models are loaded once by a process of that environment, which measures the whole sweep."""
    if python is None:
        raise SpecError("vLLM lives in an environment of its own: say --python with its interpreter")
    with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as place:
        directories = {name: Path(place) / name for name in sources}
        weights = {}
        for name, source in sources.items():
            directories[name].mkdir()
            written = export_hf(source, directories[name], widths="any", dtype=target.dtype)
            weights[name] = written.bytes
        traffics = [
            Traffic(prompt_tokens=context, generated_tokens=sweep.generated_tokens, batch_size=batch)
            for batch, context in itertools.product(sweep.batch_sizes, sweep.contexts)
        ]
        answer = _ask_vllm(python, directories, traffics, target, Path(place) / "answer.json")
        times = dict(zip(traffics, answer["times"], strict=True))

        def measure(traffic: Traffic) -> Measured:
            return _timings(times[traffic]), _with_cache(weights, sources, traffic, DTYPE_BYTES[target.dtype])

        yield f"vLLM {answer['version']}", measure


_ENGINES: dict[Engine, Any] = {"torch": _in_torch, "llama.cpp": _in_llama_cpp, "vllm": _in_vllm}


def _ask_vllm(
    python: Path, directories: Mapping[str, Path], traffics: list[Traffic], target: TargetSpec, answer: Path
) -> Any:
    asked = {
        "directories": {name: str(directory) for name, directory in directories.items()},
        "traffics": [traffic.model_dump() for traffic in traffics],
        "dtype": target.dtype,
        "threads": target.threads,
        "rounds": target.rounds,
    }
    try:
        done = subprocess.run(
            [python, VLLM_SCRIPT, answer], input=json.dumps(asked), text=True, capture_output=True, check=False
        )
    except OSError as error:
        raise SpecError(f"--python {python} cannot be run ({error.strerror})") from error
    if done.returncode or not answer.exists():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MeasurementError(f"vLLM in {python} failed with {done.returncode}: {last}")
    return json.loads(answer.read_text())


def _timings(times: Mapping[str, latency.Rounds]) -> dict[str, Timing]:
    return {name: latency.timing_of(rounds) for name, rounds in times.items()}


def _with_cache(
    weights: Mapping[str, float], sources: Mapping[str, Source], traffic: Traffic, entry_bytes: float
) -> dict[str, float]:
    """Bytes of the weights and of the KV cache of the whole batch at its full context."""
    tokens = traffic.batch_size * (traffic.prompt_tokens + traffic.generated_tokens)
    return {
        name: weights[name] + entry_bytes * tokens * kv_entries_per_token(source.shape, source.architecture)
        for name, source in sources.items()
    }
