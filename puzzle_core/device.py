"""The torch device of the current task, its types of products, and the GPUs, cores and memory of this process."""

import contextlib
import contextvars
import functools
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

log = logging.getLogger("puzzle")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time that a container may take in a period, and the period."""

_current_device: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("device", default=None)


def default_device() -> torch.device:
    """The device set by `on_device`; otherwise the first GPU, or the CPU where there is no GPU."""
    device = _current_device.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        use_tensor_float_32()
    return device


@functools.cache
def use_tensor_float_32() -> None:
    """Let GPUs round the factors of float32 products to TF32 (10 bits of mantissa), in this whole process.

    `torch.set_float32_matmul_precision` would change the products of processors, too.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    log.info("float32 products on GPUs are TF32: their factors have 10 bits of mantissa")


def fast_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """The type of matrix products that is fast and good enough for training: what `auto` means in a specification.

    bfloat16 on GPUs that have it (NVIDIA's since Ampere), and on processors with AVX-512 BF16 or AMX.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def device_name(device: torch.device) -> str:
    """The model name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
        return ", ".join(sorted(models)) or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """UUIDs of this process's GPUs, in the order of torch's device numbers; a UUID is the same in all processes."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def visible_gpus(numbers: list[int]) -> dict[str, str]:
    """Environment variables that limit another process to these GPUs, given by this process's device numbers."""
    if not numbers:
        return {}
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    identifiers = inherited.split(",") if inherited else [str(number) for number in range(max(numbers) + 1)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(identifiers[number].strip() for number in numbers)}


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make this device the default of the current context (thread or task)."""
    token = _current_device.set(device)
    try:
        yield
    finally:
        _current_device.reset(token)


def on_first(gpus: list[int]) -> contextlib.AbstractContextManager[None]:
    """Make the first of these GPUs the default device of the current context; an empty list changes nothing."""
    return on_device(torch.device("cuda", gpus[0])) if gpus else contextlib.nullcontext()


def available_cores() -> int:
    """Number of CPU cores that this process may use: those it may run on, or the quota of its control group if less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return cores


def memory_bytes() -> float:
    """Memory in bytes that this process may use: that of the machine, or the limit of its control group if lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            return min(machine, float(file.read().replace("max", "inf")))
    except OSError:
        return machine


def device_memory_bytes() -> float:
    """Memory in bytes of all GPUs together, or that which this process may use where there is none."""
    if not torch.cuda.is_available():
        return memory_bytes()
    return sum(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))


def use_threads(threads: int) -> None:
    """Set torch's number of threads for the calling thread, at least 1 and at most the number of available cores."""
    torch.set_num_threads(max(1, min(threads, available_cores())))
