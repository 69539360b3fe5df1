"""Contexts of runs."""

import pytest

from puzzle_core.spec import ParentSpec, RuntimeSpec
from tasks.runtime.context import RunContext


@pytest.fixture
def context_of(checkpoint_of, tmp_path):
    """A context with an empty store, and these runtime settings."""

    def make(path=None, **runtime):
        places = {"store": str(tmp_path / "store"), "scratch": str(tmp_path / "scratch")}
        parent = ParentSpec(path=str(path or checkpoint_of("llama")))
        return RunContext(parent=parent, runtime=RuntimeSpec.model_validate(places | runtime))

    return make
