"""Tests leave nothing in the environment of their process, and no process of their own."""

import pytest


@pytest.fixture(autouse=True)
def _own_environment(own_environment: None, no_process_left: None) -> None:
    """Every test of this folder restores the environment, and ends what it started."""
