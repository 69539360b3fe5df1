"""The arrow flows -> tasks -> puzzle_core, without a cycle, and what each part may import (DESIGN section 3)."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("puzzle_core", "tasks", "flows")
    for file in sorted((ROOT / package).rglob("*.py"))
}
WITHOUT_TORCH = [f"puzzle_core.{module}" for module in ("spec_file", "work", "plan", "resources", "sizes", "target")]
WITHOUT_TORCH += [
    f"puzzle_core.{module}" for module in ("architecture", "engines", "variants.kinds", "variants.entries")
]
WITHOUT_TORCH += [f"puzzle_core.cost.{module}" for module in ("roofline", "calibrate")]
WITHOUT_TORCH += [f"puzzle_core.{part}" for part in ("search", "interop", "formats")]
WITHOUT_TORCH = [module for module in FILES if module.startswith(tuple(WITHOUT_TORCH))]


@functools.cache
def imported(module: str) -> set[str]:
    """Full names of everything that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names} | {origin}
    return found


def offenders(package: str, forbidden: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    """Modules of a package that import something forbidden."""
    modules = [module for module in FILES if f"{module}.".startswith(package) and module not in allowed]
    return [f"{m} imports {n}" for m in modules for n in sorted(imported(m)) if n.split(".")[0] in forbidden]


def test_the_walk_sees_every_way_to_import(tmp_path, monkeypatch):
    file = tmp_path / "module.py"
    file.write_text("import a.b\nfrom c import d\n\ndef f():\n    from . import e\n    from ..g import h\n")
    monkeypatch.setitem(FILES, "tasks.deep.module", file)
    assert imported("tasks.deep.module") == {"a.b", "c", "c.d", "tasks.deep", "tasks.deep.e", "tasks.g", "tasks.g.h"}
    monkeypatch.setitem(FILES, "puzzle_core.wrong", file)
    assert offenders("puzzle_core.", {"c"}) == ["puzzle_core.wrong imports c", "puzzle_core.wrong imports c.d"]


@pytest.mark.parametrize(
    ("package", "forbidden", "allowed"),
    [
        ("puzzle_core.", {"prefect", "mlflow", "s3fs", "fsspec", "flows", "tasks"}, ()),
        ("tasks.", {"flows"}, ()),
        ("flows.", {"torch"}, ()),
        ("", {"mlflow"}, tuple(module for module in FILES if module.startswith("tasks.tracking."))),
        ("", {"s3fs", "fsspec", "botocore", "aiohttp"}, ("tasks.store.bucket",)),
    ],
)
def test_parts_import_only_what_is_theirs(package, forbidden, allowed):
    assert offenders(package, forbidden, allowed) == []


def room(module: str) -> str:
    """The folder or the single file of a package that a module is in: `puzzle_core.search`, `puzzle_core.spec`."""
    return ".".join(module.split(".")[:2])


def arrows_between_rooms() -> dict[str, set[str]]:
    """By folder or single file, the others that its modules import."""
    arrows: dict[str, set[str]] = {room(module): set() for module in FILES}
    for module in FILES:
        named = (name for name in imported(module) if name in FILES and "." in name)
        arrows[room(module)] |= {room(name) for name in named} - {room(module)}
    return arrows


def test_modules_import_in_no_circle():
    graph = {module: imported(module) & FILES.keys() - {module} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()


def test_folders_and_single_files_import_in_no_circle():
    graphlib.TopologicalSorter(arrows_between_rooms()).prepare()


@pytest.mark.parametrize(
    ("module", "line", "circle"),
    [
        ("puzzle_core.sizes", "from puzzle_core.cost.roofline import roofline", "puzzle_core.cost"),
        ("puzzle_core.model.parent", "from puzzle_core.export import hf", "puzzle_core.export"),
        ("tasks.store.store", "from tasks.runtime.context import RunContext", "tasks.runtime"),
        ("flows.submit", "def f():\n    from flows.cli.main import main", "flows.cli"),
    ],
)
def test_one_line_in_the_wrong_direction_is_seen(tmp_path, monkeypatch, module, line, circle):
    file = tmp_path / "module.py"
    file.write_text(f"{FILES[module].read_text()}\n{line}\n")
    monkeypatch.setitem(FILES, module, file)
    imported.cache_clear()
    try:
        with pytest.raises(graphlib.CycleError) as error:
            test_folders_and_single_files_import_in_no_circle()
        assert circle in error.value.args[1]
    finally:
        imported.cache_clear()


def test_no_two_files_have_one_name():
    names = [Path(file).name for file in FILES.values() if file.stem not in ("__init__", "__main__")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_search_never_imports_models():
    modules = [module for module in FILES if module.startswith("puzzle_core.search")]
    assert not [m for m in modules if any(name.startswith("puzzle_core.model") for name in imported(m))]


def test_a_search_from_tables_loads_no_torch():
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print([m for m in sys.modules if m in ('torch', 'transformers')])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
