"""The campaign that importers are tried on."""

from pathlib import Path

import pytest

from tests.puzzletron import Campaign, make_campaign


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A campaign of four layers, in a directory of its own."""
    return make_campaign(tmp_path / "puzzle")
