"""Threads: as many as asked for, never more than there are cores, never none."""

import pytest
import torch

from puzzle_core import device


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (1, 1), (3, 3), (1000, 4)])
def test_threads_are_at_most_the_cores(asked, given, monkeypatch):
    seen = []
    monkeypatch.setattr(device, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    device.use_threads(asked)
    assert seen == [given]


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("250000 100000", 3),
        ("5000 100000", 1),
        ("9000000 100000", 8),
        ("", 8),
        (None, 8),
    ],
)
def test_cores_are_those_that_the_process_may_use(quota, cores, monkeypatch, tmp_path):
    """A container with a quota sees all cores of its machine."""
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert device.available_cores() == cores


def test_there_is_at_least_one_core():
    assert device.available_cores() >= 1


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"neon": True}, "float32"),
    ],
)
def test_a_processor_with_products_of_bfloat16_uses_them(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.fast_dtype(torch.device("cpu")) == dtype


def test_this_processor_is_one_or_the_other():
    assert device.fast_dtype(torch.device("cpu")) in ("float32", "bfloat16")
