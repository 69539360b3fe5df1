"""Core's tests compare bits, so they stay on the CPU wherever they run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
