"""Writes a safetensors checkpoint tensor by tensor, from shapes and types that are known before any value is.

`write_checkpoint` keeps a shard in memory; here only the present tensor is. Format: eight bytes with the length of the
header, the header as JSON, then the values (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from puzzle_core.errors import StorageError
from puzzle_core.model.checkpoint import MAX_SHARD_BYTES, shard_names, write_index

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class StreamedTensor(NamedTuple):
    """A tensor by name, shape, type, and the function that makes its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_streamed(directory: Path, tensors: Sequence[StreamedTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors in the given order, one in memory at a time: one file, or shards with an index."""
    shards: list[list[StreamedTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size_bytes
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_index(directory, weight_map, sum(tensor.size_bytes for tensor in tensors))


def map_new_tensor(file: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a safetensors file of one tensor, and map its values for writing: they need not fit in memory.

    Raises:
        StorageError: the disk has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    header = _header([(name, shape, dtype)])
    try:
        with file.open("xb") as opened:
            opened.write(header)
            os.posix_fallocate(opened.fileno(), 0, len(header) + size)
    except OSError as error:
        raise StorageError(f"cannot reserve {size:,} bytes for {file} ({error.strerror}): free some space") from error
    values = np.memmap(file, np.uint8, "r+", offset=len(header), shape=(size,))
    return torch.from_numpy(values).view(dtype).view(shape)


def _header(tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> bytes:
    """What stands before the values of a file with these tensors, in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(file: Path, tensors: list[StreamedTensor]) -> None:
    with file.open("xb") as opened:
        opened.write(_header([(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]))
        for tensor in tensors:
            values = tensor.make()
            assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype), tensor.name
            opened.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)
