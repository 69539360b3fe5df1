"""An open GGUF file: its metadata by name, with errors for what is missing or of the wrong kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor

from puzzle_core.errors import ParentError, reason


class GgufFile:
    """The metadata and the tensors of one file. Tensors are mapped, so opening reads no weights."""

    def __init__(self, file: Path):
        """Open a file.

        Raises:
            ParentError: the file is missing, no GGUF file, truncated, a part of several, or holds no language model.
        """
        self.file = file
        try:
            reader = GGUFReader(file)
        except FileNotFoundError as error:
            raise ParentError(f"{file} does not exist") from error
        except Exception as error:  # the package has no error of its own for damaged files
            raise ParentError(
                f"{file} is truncated or no GGUF file ({type(error).__name__}: {reason(error)}): fetch it again"
            ) from error
        self._fields = reader.fields
        self.tensors: Mapping[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        if (parts := self.get("split.count", int, 1)) > 1:
            raise ParentError(
                f"{file} is one of {parts} parts: join them first (llama.cpp's `llama-gguf-split --merge`)"
            )
        if (kind := self.get("general.type", str, "model")) != "model":
            raise ParentError(f"{file} holds a GGUF of type {kind!r}: give the file of the whole model")
        self.architecture: str = self.require("general.architecture", str)

    @property
    def names(self) -> list[str]:
        """Names of all metadata."""
        return list(self._fields)

    def has(self, name: str) -> bool:
        """Whether the file has this metadata."""
        return name in self._fields

    def value(self, name: str) -> Any:
        """Metadata as plain Python values; None where the file has none of this name."""
        return self._fields[name].contents() if name in self._fields else None

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Metadata of a kind, or the default.

        Raises:
            ParentError: it is of another kind.
        """
        value = self.value(name)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ParentError(f"{self.file}: {name} is {value!r:.80}, where a {kind.__name__} is expected")
        return value

    def require(self, name: str, kind: type) -> Any:
        """Metadata that the file must have.

        Raises:
            ParentError: it is missing, or of another kind.
        """
        value = self.get(name, kind)
        if value is None:
            raise ParentError(f"{self.file} lacks the metadata {name}: convert the model again, or fetch another file")
        return value

    def size(self, name: str) -> int:
        """A whole number above 0 under the architecture's prefix. An array of equal numbers is that number.

        Raises:
            ParentError: it is missing, not such a number, or differs between layers.
        """
        full = f"{self.architecture}.{name}"
        value = self.value(full)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise ParentError(f"{self.file}: {full} differs between layers, and the layers of a parent are equal")
            value = value[0]
        if value is None:
            raise ParentError(f"{self.file} lacks the metadata {full}: convert the model again, or fetch another file")
        if type(value) is not int or value < 1:
            raise ParentError(f"{self.file}: {full} is {value!r:.80}, where a whole number above 0 is expected")
        return value
