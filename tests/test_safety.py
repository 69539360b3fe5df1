"""What no source here does: unpickle, run text as code, load YAML as objects, trust a checkpoint's code unasked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    file for folder in ("puzzle_core", "tasks", "flows", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "imp"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system"}
CALLS |= {"os.popen", "pandas.read_pickle", "pd.read_pickle", "torch.hub.load", "tempfile.mktemp"}
FLAGS = {"shell": True, "allow_pickle": True, "weights_only": False}


def offences(text: str, remote_code: bool) -> list[str]:
    """What a source does that it may not; `remote_code`: whether it may run a checkpoint's code without asking."""
    flags = FLAGS if remote_code else FLAGS | {"trust_remote_code": True}
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in full if name.split(".")[0] in MODULES or name in CALLS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in CALLS | NAMES else []
            given = {word.arg: word.value for word in node.keywords if word.arg in flags}
            found += [n for n, v in given.items() if isinstance(v, ast.Constant) and v.value == flags[n or ""]]
    return found


@pytest.mark.parametrize(
    ("line", "offence"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from cloudpickle import dumps", "cloudpickle.dumps"),
        ("from torch import load", "torch.load"),
        ("x = torch.load(file, weights_only=True)", "torch.load"),
        ("numpy.load(file, allow_pickle=True)", "allow_pickle"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("eval(text)", "eval"),
        ("subprocess.run(command, shell=True)", "shell"),
        ("AutoConfig.from_pretrained(place, trust_remote_code=True)", "trust_remote_code"),
    ],
)
def test_the_walk_sees_what_it_looks_for(line, offence):
    assert offences(line, remote_code=False) == [offence]


def test_no_source_unpickles_or_runs_text():
    """Benchmarks, and `puzzle bench` in vLLM, load what they have just exported, by the code that travels with it.

    So does the file that MLflow loads a child by, which lies beside that code.
    """
    asked = ("vllm_script.py", "puzzle_pyfunc.py")
    found = {
        str(file.relative_to(ROOT)): offences(
            file.read_text(), remote_code=file.parent.name == "benchmarks" or file.name in asked
        )
        for file in SOURCES
    }
    assert len(found) > 100
    assert {file: names for file, names in found.items() if names} == {}
