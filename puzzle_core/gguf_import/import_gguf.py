"""Writes a Hugging Face directory of a GGUF file, atomically, with one tensor in memory at a time."""

import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ParentError
from puzzle_core.formats.block_configs import block_config
from puzzle_core.gguf_import.gguf_config import gguf_config
from puzzle_core.gguf_import.gguf_metadata import GgufFile
from puzzle_core.gguf_import.gguf_tensors import imported_tensors
from puzzle_core.gguf_import.gguf_vocabulary import write_tokenizer
from puzzle_core.model.child_config import child_config
from puzzle_core.model.parent import Parent, tensor_shapes
from puzzle_core.model.parent_config import as_config_says, read_config, shape_of
from puzzle_core.model.tensor_stream import write_streamed
from puzzle_core.records import Record
from puzzle_core.spec import ParentSpec

IMPORT_VERSION = 1
"""Rises with every change of what is written for the same file."""


class GgufImportRecord(Record):
    """The outcome of an import. `types` counts the tensors of each of GGUF's types."""

    family: str
    layers: int
    parameters: int
    tokens: int
    types: dict[str, int]


def import_gguf(file: Path, out_dir: Path) -> GgufImportRecord:
    """Write `out_dir`: config, weights, tokenizer, chat templates, generation config.

    Args:
        file: a GGUF file of a supported architecture.
        out_dir: a directory that is not there yet, or is empty.

    Raises:
        ParentError: the file cannot be read or imported, or `out_dir` holds files.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ParentError(f"{out_dir} exists and is not empty: name another directory, or remove it")
    source = GgufFile(file)
    config = gguf_config(source)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.parent / f".{out_dir.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        record = _write(source, config, temporary)
        Parent(ParentSpec(path=str(temporary))).tokenizer()
        if out_dir.exists():
            out_dir.rmdir()
        temporary.rename(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _write(source: GgufFile, config: dict[str, Any], directory: Path) -> GgufImportRecord:
    _write_json(directory / "config.json", config)
    tensors = imported_tensors(source, _expected_shapes(directory), config["head_dim"])
    _write_json(directory / "config.json", config | {"dtype": str(tensors[0].dtype).removeprefix("torch.")})
    tokens = write_tokenizer(source, config["vocab_size"], config["max_position_embeddings"], directory)
    _write_json(directory / "generation_config.json", _generation(source, config))
    write_streamed(directory, tensors)
    types = [tensor.tensor_type.name for tensor in source.tensors.values()]
    return GgufImportRecord(
        family=config["model_type"],
        layers=config["num_hidden_layers"],
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        tokens=tokens,
        types={name: types.count(name) for name in sorted(set(types))},
    )


def _expected_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors that the config.json in a directory asks for."""
    config, _ = read_config(directory)
    with as_config_says(directory):
        layers = Architecture.of_parent(shape_of(config, directory)).layers
        return tensor_shapes(child_config(config, [block_config(block) for block in layers]))


def _generation(source: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the special tokens. A text ends with the end of text, or with the end of a turn where it differs."""
    numbers = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = [numbers["eos_token_id"], source.get("tokenizer.ggml.eot_token_id", int)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    numbers["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    return {name: value for name, value in numbers.items() if value is not None}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
