"""Other projects' JSON files, read into what this project needs of them; everything else in them is left alone."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from puzzle_core.errors import SpecError


class Foreign(BaseModel):
    """Base of what is read out of a foreign file. Unlike our records it takes no offence at keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


Shape = TypeVar("Shape", bound=Foreign)


def read_json(path: Path, what: str, *kinds: type) -> Any:
    """The content of a JSON file.

    Args:
        what: what the file is, for messages.
        kinds: what it may hold at the top: `list`, `dict` or both.

    Raises:
        SpecError: it is missing, not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise SpecError(f"{path}, {what}, is not JSON (cut off while it was written?): {error}") from error
    if not isinstance(content, kinds):
        names = " or ".join("a list" if kind is list else "an object" for kind in kinds)
        raise SpecError(f"{path}, {what}, must hold {names}; it holds {type(content).__name__} instead")
    return content


def parse_foreign(shape: type[Shape], content: Any, place: str) -> Shape:
    """Part of a foreign file's content.

    Raises:
        SpecError: a key is missing or of another type; names the place and the first such key.
    """
    try:
        return shape.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole of it"
        given = "" if first["type"] == "missing" else f" (found {str(first['input'])[:80]!r})"
        raise SpecError(f"{place}: {where}: {first['msg']}{given}") from error
