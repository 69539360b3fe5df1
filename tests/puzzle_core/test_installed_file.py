"""Files of installed packages: found without an import, and what is missing is said."""

import pytest

from puzzle_core.errors import SpecError
from puzzle_core.installed_file import local_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that cannot be imported, as one without its dependencies."""
    directory = tmp_path / "parents_in_a_package"
    directory.mkdir()
    (directory / "__init__.py").write_text("raise ImportError('a dependency is missing')\n")
    (directory / "model.gguf").write_text("GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    return directory


def test_a_file_of_a_package_is_found_without_importing_it(package):
    assert local_path("python-package:parents_in_a_package/model.gguf") == package / "model.gguf"


def test_other_names_are_paths(tmp_path):
    assert local_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package_here/model.gguf", r"no package no_such_package_here is installed.*make smollm2"),
        ("parents_in_a_package/other.gguf", r"has no file other.gguf"),
        ("parents_in_a_package", r"say python-package:NAME/FILE"),
        ("parents_in_a_package/../x", r"say python-package:NAME/FILE"),
    ],
)
def test_what_is_missing_is_said(package, name, message):
    with pytest.raises(SpecError, match=message):
        local_path(f"python-package:{name}")
