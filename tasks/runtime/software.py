"""The software of this process, as manifests record it and as the workers of a cluster are compared."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from puzzle_core.records import digest_file, digest_files
from tasks.store.origin import Software

ROOT = Path(__file__).parents[2]
PACKAGES = ("puzzle_core", "tasks", "flows")
LOCK = "constraints.txt"
VERSIONS = (
    "puzzle-on-prefect",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "highspy",
    "prefect",
    "mlflow",
)
GIT_SECONDS = 10


def code_digest(root: Path) -> str:
    """Digest of the project's source files, with their paths."""
    files = (file for package in PACKAGES for file in sorted((root / package).rglob("*")))
    return digest_files((file for file in files if file.is_file() and "__pycache__" not in file.parts), root)


_CODE = code_digest(ROOT)  # read on import: a process keeps the modules that it has imported when files change


@functools.cache
def software() -> Software:
    """The software of this process."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    lock = ROOT / LOCK
    return Software(
        code=_CODE,
        commit=commit,
        dirty=None if changes is None else bool(changes),
        lock=digest_file(lock) if lock.is_file() else None,
        versions={"python": platform.python_version()} | {n: v for n in VERSIONS if (v := _version(n))},
    )


def difference(ours: Software, theirs: Software) -> str | None:
    """What another process has otherwise, in a sentence; nothing where its code and its packages are the same."""
    names = sorted(ours.versions.keys() | theirs.versions.keys())
    pairs = {name: (ours.versions.get(name, "none"), theirs.versions.get(name, "none")) for name in names}
    other = [f"{name} {version} instead of {wanted}" for name, (wanted, version) in pairs.items() if wanted != version]
    if other:
        return f"it has {', '.join(other)}: install the versions of {LOCK}"
    if ours.code != theirs.code:
        return (
            f"its code of this project has the digest {theirs.code}, that of the run {ours.code}: install the same "
            "commit, and start the worker again"
        )
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git prints about the checkout that this code lies in; none where there is no checkout, or no git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
