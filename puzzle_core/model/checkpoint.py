"""Safetensors checkpoints: read tensor by tensor, sharded or not, and written shard by shard.

Pickle files are never read. Every read opens its file again, so threads may share a `Checkpoint`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from puzzle_core.errors import PuzzleError
from puzzle_core.records import write_text_atomic

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
DERIVED = "rotary_emb.inv_freq"  # a buffer that old versions of transformers wrote; it follows from the config


class TensorHeader(NamedTuple):
    """Shape and dtype of one tensor, from a safetensors header."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a Hugging Face directory, a parent's or a child's, by name."""

    def __init__(self, directory: Path, error: type[PuzzleError]):
        """Read the headers of all shards.

        Args:
            error: what is raised when the checkpoint is damaged: ParentError for a parent, ArtifactError for a child.

        Raises:
            error: no safetensors, a missing or truncated shard, or an index that names a tensor no shard has.
        """
        self.directory, self.error = directory, error
        self.files, indexed = checkpoint_files(directory, error)
        self.headers: dict[str, TensorHeader] = {}
        self._file_of: dict[str, Path] = {}
        self.chosen: dict[str, str] = {}
        """Of tensors that several shards hold: the one that the index names, relative to the directory."""
        headers = {file: _read_headers(file, error) for file in self.files}
        holders: dict[str, list[Path]] = {}
        for file, headers_of_file in headers.items():
            for name in headers_of_file:
                if not name.endswith(DERIVED):
                    holders.setdefault(name, []).append(file)
        missing = sorted(n for n, file in indexed.items() if file not in holders.get(n, ()) and not n.endswith(DERIVED))
        if missing:
            raise error(
                f"{directory / INDEX} names {len(missing)} tensors that its shards do not hold, the first being "
                f"{missing[0]!r} in {indexed[missing[0]].name}: fetch or make the checkpoint again"
            )
        for name, files in holders.items():
            if len(files) > 1 and name not in indexed:
                names = ", ".join(file.name for file in files)
                raise error(
                    f"{directory} holds {name!r} in {len(files)} shards ({names}), and {INDEX} does not say which one "
                    "counts: fetch or make the checkpoint again"
                )
            self._file_of[name] = file = indexed.get(name, files[0])
            self.headers[name] = headers[file][name]
            if len(files) > 1:
                self.chosen[name] = file.relative_to(directory).as_posix()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its file.

        Raises:
            PuzzleError: the file cannot be read any more; its class is that of the constructor.
        """
        try:
            with safe_open(self._file_of[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise self.error(f"cannot read {name!r} from {self._file_of[name]}: {error}") from error

    def check(self, expected: Mapping[str, tuple[int, ...]], names: Iterable[str] | None = None) -> None:
        """Compare names and shapes of the tensors with those that a model has; a stored copy of a tied head is allowed.

        Args:
            expected: shapes by name.
            names: the tensors to compare; all when not given.

        Raises:
            PuzzleError: names the first tensor that differs; its class is that of the constructor.
        """
        stored = {name: self.headers[name].shape for name in (self.headers if names is None else names)}
        if "lm_head.weight" not in expected:
            stored.pop("lm_head.weight", None)
        common = expected.keys() & stored.keys()
        for differing, text in (
            (expected.keys() - stored.keys(), "its config.json asks for {n} tensors that it lacks"),
            (stored.keys() - expected.keys(), "it holds {n} tensors that its config.json has no place for"),
            (
                {name for name in common if expected[name] != stored[name]},
                "{n} tensors have other shapes than its config.json asks for",
            ),
        ):
            if differing:
                first = min(differing)
                raise self.error(
                    f"{self.directory} does not match its own config: {text.format(n=len(differing))}, the first being "
                    f"{first!r} (config {expected.get(first, 'none')}, checkpoint {stored.get(first, 'none')}): fetch "
                    f"or make the checkpoint again"
                )

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, under their names without it."""
        return {n.removeprefix(prefix): self.tensor(n) for n in self.headers if n.startswith(prefix)}


def write_checkpoint(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors in the given order, with at most one shard in memory: one file, or shards with an index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    files = total = shard_bytes = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shards[0] and shard_bytes + size > max_shard_bytes:
            files, shard_bytes = files + 1, 0
            weight_map |= _save_part(directory, files, shards.pop())
            shards.append({})
        shards[0][name] = tensor.detach().cpu().contiguous()
        shard_bytes, total = shard_bytes + size, total + size
    if not files:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map |= _save_part(directory, files + 1, shards[0])
    names = shard_names(files + 1)
    for part, name in enumerate(names, 1):
        _part(directory, part).rename(directory / name)
    write_index(directory, {name: names[part - 1] for name, part in weight_map.items()}, total)


def shard_names(count: int) -> list[str]:
    """The names of a checkpoint's files, by transformers' rule."""
    return [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_index(directory: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Write which file has which tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_text_atomic(directory / INDEX, json.dumps(index, indent=1))


def _part(directory: Path, part: int) -> Path:
    return directory / f".model-{part:05d}.safetensors"


def _save_part(directory: Path, part: int, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    save_file(tensors, _part(directory, part), metadata={"format": "pt"})
    return dict.fromkeys(tensors, part)


class CheckpointFiles(NamedTuple):
    """The files of a checkpoint's weights, sorted, and by tensor the one that the index names, if there is an index."""

    files: list[Path]
    indexed: dict[str, Path]


def checkpoint_files(directory: Path, error: type[PuzzleError]) -> CheckpointFiles:
    """The files that weights are read from, by transformers' own rule.

    `model.safetensors` counts before an index with its shards. Of an index the shards that it names count, also in a
    folder. Files in other formats beside them do not.

    Raises:
        error: there is neither, the index is not valid, or shards are missing.
    """
    if (directory / SINGLE).is_file():
        return CheckpointFiles([directory / SINGLE], {})
    if (directory / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
            indexed = {name: directory / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise error(f"{directory / INDEX} is not a safetensors index: {cause}") from cause
        outside = sorted(file for file in set(weight_map.values()) if _leaves(file))
        if outside or not indexed:
            names = f"a shard outside its directory, {outside[0]!r}" if outside else "no shards"
            raise error(f"{directory / INDEX} names {names}: fetch or make the checkpoint again")
        shards = sorted(set(indexed.values()))
        missing = [shard.relative_to(directory).as_posix() for shard in shards if not shard.is_file()]
        if missing:
            raise error(
                f"{directory} lacks {len(missing)} of its {len(shards)} shards, the first being {missing[0]}: fetch "
                f"or make the checkpoint again"
            )
        return CheckpointFiles(shards, indexed)
    others = [file.name for file in sorted(directory.glob("*.safetensors"))]
    hint = f"; {others[0]} is not a name that transformers reads: save the model with save_pretrained" if others else ""
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
    hint += f"; {pickled[0].name} is a pickle, which is never read: convert it to safetensors" if pickled else ""
    raise error(f"{directory} holds neither {SINGLE} nor {INDEX}{hint}")


def _leaves(file: str) -> bool:
    """Whether a path in an index leads out of the checkpoint's directory."""
    path = PurePosixPath(file)
    return path.is_absolute() or ".." in path.parts or "\\" in file


def _read_headers(file: Path, error: type[PuzzleError]) -> dict[str, TensorHeader]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: TensorHeader(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as cause:
        raise error(f"{file} is truncated or no safetensors file ({cause}): fetch or make it again") from cause
