"""Which device runs, and how many threads it may use."""

import contextlib
import contextvars
import os
import platform
from collections.abc import Iterator

import torch

_given: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar("device", default=None)


def default_device() -> torch.device:
    """The device that was given to the task at hand; otherwise the first GPU, or the CPU where there is none."""
    return _given.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = {line.split(":", 1)[1].strip() for line in file if line.startswith("model name")}
        return ", ".join(sorted(models)) or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """This process's GPUs, by names that all processes of a machine share; their places are torch's numbers."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def visible_gpus(numbers: list[int]) -> dict[str, str]:
    """What the environment of another process has to say for it to see only these of this process's GPUs."""
    if not numbers:
        return {}
    here = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = here.split(",") if here else [str(number) for number in range(max(numbers) + 1)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(named[number].strip() for number in numbers)}


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Give the thread at hand a device."""
    token = _given.set(device)
    try:
        yield
    finally:
        _given.reset(token)


def on_first(gpus: list[int]) -> contextlib.AbstractContextManager[None]:
    """Give the thread at hand the first of these GPUs, if there is one."""
    return on_device(torch.device("cuda", gpus[0])) if gpus else contextlib.nullcontext()


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> float:
    """Memory that this process may use: the machine's, or less where its control group has a limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            return min(machine, float(file.read().replace("max", "inf")))
    except OSError:
        return machine


def use_threads(threads: int) -> None:
    """Let torch use this many threads in the calling thread, and no more than there are cores."""
    torch.set_num_threads(max(1, min(threads, available_cores())))
