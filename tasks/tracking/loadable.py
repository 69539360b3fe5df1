"""What makes a child's files a model that MLflow loads: the file MLmodel and the few that it names.

`mlflow.transformers.load_model` and `mlflow.pyfunc.load_model` find it where a registered version lies. The child is
not copied. With a local store, MLflow's directory has hard links to the child's files (symbolic links on another disk).
With a bucket, the version's source is the place of the child's files, and the few files are written beside them.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import numpy as np
import yaml
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from puzzle_core.model import remote
from puzzle_core.model.tokenizer import tokenizer_files
from tasks.runtime.software import software
from tasks.store.store import Store

log = logging.getLogger("puzzle")
LOADER = "puzzle_pyfunc"
MODEL_FILE, CODE, TOKENIZER = "MLmodel", "code", Path("components") / "tokenizer"
EXAMPLE = "input_example.json"
EXAMPLE_TOKENS = 8
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "mlflow")


class Checkpoint(NamedTuple):
    """A child's checkpoint in a store."""

    store: Store
    key: str

    def publish(self, logged: LoggedModel, metadata: Mapping[str, str]) -> str | None:
        """Make the checkpoint a model that MLflow loads.

        Args:
            logged: the child's logged model.
            metadata: what MLmodel says of the child.

        Returns:
            The place in the bucket that is the source of the registered version; none where that is the place of the
            logged model's artifacts.
        """
        sizes = {name: file.size_bytes for name, file in self.store.manifest(self.key).files.items()}

        def describe(place: Path) -> None:
            write_description(self.store.fetch(self.key), place, logged, metadata, sum(sizes.values()))

        if not self.store.is_local:
            return self.store.add_beside(self.key, MODEL_FILE, describe)
        directory = local_directory(logged.artifact_location)
        if directory is None:
            log.warning(
                "MLflow cannot load %s: its server keeps artifacts at %s, and the store is a directory of this "
                "machine. Keep the store in a bucket (runtime.store)",
                *(logged.name, logged.artifact_location),
            )
        else:
            link_files(self.store.fetch(self.key), sizes, directory)
            describe(directory)
        return None


def local_directory(location: str) -> Path | None:
    """The directory of an artifact location of MLflow; none where it is not a local one."""
    parts = urlparse(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def link_files(source: Path, names: Iterable[str], directory: Path) -> None:
    """Link files of a directory into another one, where they are not there yet."""
    for name in names:
        file, link = source / name, directory / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.exists():
            continue
        try:
            os.link(file, link)
        except OSError:  # another disk, or a file system without hard links
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())


def write_description(
    child: Path, directory: Path, logged: LoggedModel, metadata: Mapping[str, str], size_bytes: int
) -> None:
    """Write MLmodel, the environment, an example of the input, the loader's code and the tokenizer.

    Args:
        child: the directory of the child's checkpoint.
        directory: where to write.
        logged: the child's logged model.
        metadata: what MLmodel says of the child.
        size_bytes: of the child's files.
    """
    config = json.loads((child / "config.json").read_text())
    requirements = _write_environment(directory)
    (directory / CODE).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(remote.__path__[0]) / f"{LOADER}.py", directory / CODE / f"{LOADER}.py")
    example = {"input_ids": [list(range(EXAMPLE_TOKENS))]}
    (directory / EXAMPLE).write_text(json.dumps(example))
    tokenizer = tokenizer_files(child)
    for file in tokenizer:
        copied = directory / TOKENIZER / file.relative_to(child)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("int64"), (-1, -1), "input_ids")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1, int(config["vocab_size"])))]),
    )
    model = Model(
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        signature=signature,
        saved_input_example_info={"artifact_path": EXAMPLE, "type": "ndarray"},
        metadata=dict(metadata) | {"commit": software().commit or "", "code": software().code},
        model_size_bytes=size_bytes,
    )
    model.add_flavor(
        "transformers",
        task="text-generation",
        instance_type="TextGenerationPipeline",
        framework="pt",
        pipeline_model_type=config["architectures"][0],
        source_model_name=logged.name,
        model_binary=".",
        components=["tokenizer"],
        tokenizer_type=_tokenizer_class(child),
        transformers_version=software().versions["transformers"],
        code=None,
    )
    environment = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
    model.add_flavor(
        "python_function", loader_module=LOADER, code=CODE, env=environment, python_version=requirements["python"]
    )
    model.save(str(directory / MODEL_FILE))


def _write_environment(directory: Path) -> dict[str, str]:
    """Write the environment's files as MLflow names them; returns the versions."""
    versions = software().versions
    pinned = [f"{name}=={versions[name]}" for name in REQUIRED]
    (directory / "requirements.txt").write_text("\n".join(pinned) + "\n")
    build = {"python": versions["python"], "dependencies": ["-r requirements.txt"]}
    (directory / "python_env.yaml").write_text(yaml.safe_dump(build))
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={versions['python']}", "pip", {"pip": pinned}],
    }
    (directory / "conda.yaml").write_text(yaml.safe_dump(conda))
    return versions


def _tokenizer_class(child: Path) -> str:
    file = child / "tokenizer_config.json"
    named = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
    return str(named or "PreTrainedTokenizerFast")
