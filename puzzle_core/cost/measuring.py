"""What all measurements have in common: the device, models that take turns in rounds, and medians (METHOD section 5).

Models take turns in every round, so that a drift of the machine's speed affects all of them alike.
"""

import importlib
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from puzzle_core.device import available_cores, device_name, memory_bytes, use_tensor_float_32
from puzzle_core.engines import ENGINES
from puzzle_core.errors import MeasurementError, SpecError
from puzzle_core.progress import Report
from puzzle_core.target import TargetSpec
from puzzle_core.work import Timing, Traffic

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CLOCK_POLICY = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
OUTSIDE, PARENT = "outside", "parent"
DECODE_POINTS, STEPS_PER_POINT = 4, 8
STACK_BYTES = 512 * 2**20
"""Largest size of a model that is made for measuring one variant."""

Rounds = dict[str, list[float]]
"""Milliseconds of every round, by phase: `prefill` and `decode`."""


def target_device(target: TargetSpec) -> torch.device:
    """The torch device of a target.

    Raises:
        SpecError: the target asks for a GPU that is not there.
    """
    if "cuda" not in ENGINES[target.engine].devices:
        return torch.device("cpu")
    present = torch.cuda.is_available()
    if present:
        use_tensor_float_32()
    if target.device == "cuda" and not present:
        raise SpecError("target.device is 'cuda', but torch sees no GPU here: set 'cpu', or run on the GPU machine")
    return torch.device("cuda" if present and target.device != "cpu" else "cpu")


def hardware_name(target: TargetSpec) -> str:
    """What a target is measured on, as records and keys have it: the user's name of the machine, or a fingerprint.

    The fingerprint has what times depend on beside the target itself: device, engine, torch, cores and memory; of a GPU
    also CUDA and the driver; of a processor its clock policy, where the system says it.

    Raises:
        SpecError: the target asks for a GPU that is not there.
    """
    device = target_device(target)
    if target.machine:
        return target.machine
    parts = [device_name(device), f"{available_cores()} cores", f"{round(memory_bytes() / 2**30)} GiB"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [f"{round(properties.total_memory / 2**30)} GiB of GPU memory", f"CUDA {torch.version.cuda}"]
        parts += [f"driver {version}" for version in _first_match(NVIDIA_DRIVER, r"Kernel Module.*?\s(\d[\d.]+)")]
    else:
        parts += [f"{policy} clock" for policy in _first_match(CLOCK_POLICY, r"(\w+)")]
    if module := ENGINES[target.engine].costs_module:
        parts.append(str(importlib.import_module(module).engine_version()))
    return ", ".join(dict.fromkeys([*parts, f"torch {torch.__version__}"]))


def _first_match(file: Path, pattern: str) -> list[str]:
    """The first group of a pattern in a file of the system; nothing where there is none."""
    try:
        return re.findall(pattern, file.read_text())[:1]
    except OSError:
        return []


def take_turns(
    timers: Mapping[str, Callable[[], tuple[float, float]]], rounds: int, report: Report
) -> dict[str, Rounds]:
    """Call every timer once per round.

    Args:
        timers: by model, a function that gives its prefill and decode milliseconds.
        report: called between two timings with how many were made, those of the warm-up included.

    Returns:
        The milliseconds of every timer in every round; a first warm-up round is left out.
    """
    times: dict[str, Rounds] = {name: {"prefill": [], "decode": []} for name in timers}
    for number in range(rounds + 1):
        for place, (name, timer) in enumerate(timers.items(), start=1):
            prefill, decode = timer()
            if number:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
            report(number * len(timers) + place, (rounds + 1) * len(timers))
    return times


def decode_lengths(traffic: Traffic) -> list[int]:
    """Cache lengths around which decode steps are timed: evenly spaced, since a step's time is linear in the cache."""
    steps = traffic.generated_tokens - 1
    points = min(DECODE_POINTS, steps)
    return [traffic.prompt_tokens + int((point + 0.5) * steps / points) for point in range(points)]


def timing_of(rounds: Rounds) -> Timing:
    """Medians of the rounds, and their interquartile ranges over the medians."""

    def spread(values: list[float]) -> float:
        low, middle, high = statistics.quantiles(values, n=4)
        return (high - low) / middle if middle else 0.0

    return Timing(
        prefill_ms=statistics.median(rounds["prefill"]),
        decode_ms=statistics.median(rounds["decode"]),
        prefill_spread=spread(rounds["prefill"]),
        decode_spread=spread(rounds["decode"]),
    )


def positive_timing(name: str, rounds: Rounds) -> Timing:
    """The timing of what is measured as a difference of two models.

    Raises:
        MeasurementError: the difference is not positive, so the noise is larger than what is measured.
    """
    timing = timing_of(rounds)
    if timing.prefill_ms <= 0 or timing.decode_ms < 0:
        raise MeasurementError(
            f"measured time of {name} is not positive (prefill {timing.prefill_ms:.4f} ms, decode "
            f"{timing.decode_ms:.4f} ms): the machine is too noisy; stop other work, or raise target.rounds"
        )
    return timing
