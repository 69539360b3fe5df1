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
WITHOUT_TORCH = ["puzzle_core.spec", "puzzle_core.stages", "puzzle_core.plan", "puzzle_core.target"]
WITHOUT_TORCH += [f"puzzle_core.cost.{module}" for module in ("analytic", "roofline", "calibrate")]
WITHOUT_TORCH += [module for module in FILES if module.startswith(("puzzle_core.search", "puzzle_core.interop"))]


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
        ("", {"mlflow"}, ("tasks.tracking",)),
        ("", {"s3fs", "fsspec", "botocore", "aiohttp"}, ("tasks.store_bucket",)),
    ],
)
def test_parts_import_only_what_is_theirs(package, forbidden, allowed):
    assert offenders(package, forbidden, allowed) == []


def test_modules_import_in_no_circle():
    graph = {module: imported(module) & FILES.keys() - {module} for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()


def test_search_never_imports_models():
    modules = [module for module in FILES if module.startswith("puzzle_core.search")]
    assert not [m for m in modules if any(name.startswith("puzzle_core.model") for name in imported(m))]


def test_a_search_from_tables_loads_no_torch():
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; print([m for m in sys.modules if m in ('torch', 'transformers')])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
