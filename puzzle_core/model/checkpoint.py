"""Safetensors checkpoints: read tensor by tensor, sharded or not, and written shard by shard.

Nothing here ever unpickles. Reading opens the file anew for every call, so a reader may be shared by threads.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puzzle_core.errors import ParentError
from puzzle_core.records import write_text_atomic

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
DERIVED = "rotary_emb.inv_freq"  # a buffer that old versions of transformers wrote; it follows from the config


class TensorHeader(NamedTuple):
    """What a safetensors header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a Hugging Face directory, by name."""

    def __init__(self, directory: Path):
        """Read the headers of all shards.

        Raises:
            ParentError: no safetensors, a missing or truncated shard, or an index that names a tensor no shard has.
        """
        self.directory = directory
        self.files, named = _files(directory)
        self.headers: dict[str, TensorHeader] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            headers = {n: header for n, header in _read_headers(file).items() if not n.endswith(DERIVED)}
            self.headers |= headers
            self._file_of |= dict.fromkeys(headers, file)
        lost = sorted(name for name in named - self.headers.keys() if not name.endswith(DERIVED))
        if lost:
            raise ParentError(
                f"{directory / INDEX} names {len(lost)} tensors that its shards do not hold, the first being "
                f"{lost[0]!r}: fetch the checkpoint again"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now.

        Raises:
            ParentError: the file cannot be read any more.
        """
        try:
            with safe_open(self._file_of[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ParentError(f"cannot read {name!r} from {self._file_of[name]}: {error}") from error

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under their names without it."""
        return {n.removeprefix(prefix): self.tensor(n) for n in self.headers if n.startswith(prefix)}


def write_checkpoint(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as they come, never holding more than one shard: one file, or shards with an index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    files = total = held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shards[0] and held + size > max_shard_bytes:
            files, held = files + 1, 0
            weight_map |= _save_part(directory, files, shards.pop())
            shards.append({})
        shards[0][name] = tensor.detach().cpu().contiguous()
        held, total = held + size, total + size
    if not files:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map |= _save_part(directory, files + 1, shards[0])
    for part in range(1, files + 2):
        _part(directory, part).rename(directory / f"model-{part:05d}-of-{files + 1:05d}.safetensors")
    named = {name: f"model-{part:05d}-of-{files + 1:05d}.safetensors" for name, part in weight_map.items()}
    write_text_atomic(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": named}, indent=1))


def _part(directory: Path, part: int) -> Path:
    return directory / f".model-{part:05d}.safetensors"


def _save_part(directory: Path, part: int, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    save_file(tensors, _part(directory, part), metadata={"format": "pt"})
    return dict.fromkeys(tensors, part)


def _files(directory: Path) -> tuple[list[Path], set[str]]:
    """The safetensors files, sorted, and the tensors that an index promises."""
    if (directory / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
            shards = sorted({directory / Path(file).name for file in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParentError(f"{directory / INDEX} is not a safetensors index: {error}") from error
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ParentError(
                f"{directory} lacks {len(missing)} of its {len(shards)} shards, the first being {missing[0]}: fetch "
                f"the checkpoint again"
            )
        return shards, set(weight_map)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], set()
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
    hint = f"; {pickled[0].name} is a pickle, which is never read: convert it to safetensors" if pickled else ""
    raise ParentError(f"{directory} holds neither {SINGLE} nor {INDEX}{hint}")


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: TensorHeader(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ParentError(f"{file} is truncated or no safetensors file ({error}): fetch it again") from error
