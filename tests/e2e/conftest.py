"""Commands that run in the process of the tests leave nothing in its environment."""

import pytest


@pytest.fixture(autouse=True)
def _own_environment(own_environment: None) -> None:
    """Every test of this folder restores the environment."""
