"""What made an artifact, and how two processes are told apart."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from puzzle_core.work import ImportanceRecord, ImportanceWork
from tasks.runtime.digest_cache import parent_digest
from tasks.runtime.produce import produce
from tasks.runtime.software import PACKAGES, ROOT, code_digest, difference, software
from tasks.store.manifest import Manifest


def test_the_code_digest_follows_every_source_file(tmp_path):
    for package in PACKAGES:
        (tmp_path / package / "__pycache__").mkdir(parents=True)
        (tmp_path / package / "part.py").write_text("one")
    first = code_digest(tmp_path)
    (tmp_path / "tasks" / "__pycache__" / "part.pyc").write_text("compiled")
    (tmp_path / "notes.txt").write_text("beside the code")
    assert code_digest(tmp_path) == first
    (tmp_path / "flows" / "part.py").write_text("two")
    assert code_digest(tmp_path) != first


def test_software_names_versions_lock_and_commit():
    own = software()
    assert own.code == code_digest(ROOT)
    assert own.versions["torch"] == torch.__version__
    assert own.versions.keys() >= {"python", "puzzle-on-prefect", "transformers", "prefect", "mlflow"}
    assert own.lock == hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()
    if not (ROOT / ".git").exists():
        pytest.skip("the code lies in no git checkout")
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    assert own.commit == subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert own.dirty in (True, False)


def test_packages_and_code_tell_processes_apart_and_a_commit_alone_does_not():
    own = software()
    assert difference(own, own.model_copy(update={"commit": "another", "dirty": True, "lock": None})) is None
    assert "digest another" in difference(own, own.model_copy(update={"code": "another"}))
    other = own.model_copy(update={"versions": own.versions | {"torch": "1.0", "numpy": "1.0"}})
    assert "it has numpy 1.0 instead of" in difference(own, other)
    assert "torch 1.0 instead of" in difference(own, other)
    assert "torch none instead of" in difference(
        own, own.model_copy(update={"versions": {n: v for n, v in own.versions.items() if n != "torch"}})
    )


def test_a_manifest_says_what_made_its_artifact_and_an_older_one_still_reads(context_of):
    context = context_of().model_copy(update={"mlflow_run": "run 7"})
    work = ImportanceWork(parent=parent_digest(context.open_parent(), context.scratch), tokens="tokens")
    key = produce(work, context, lambda _: ImportanceRecord(layers=1, tokens=1))
    manifest = context.store().manifest(key)
    assert manifest.origin.software == software()
    assert (manifest.origin.parent, manifest.origin.mlflow_run) == (context.parent.path, "run 7")
    assert manifest.origin.device
    content = manifest.model_dump(mode="json")
    del content["origin"]
    assert Manifest.model_validate(content).origin is None
    assert work.key == key == f"importance/v1/{work.digest()}"
    assert Path(context.runtime.store, key).is_dir()
