"""Items of multiple-choice benchmarks from files of JSON Lines (docs/formats.md). No torch."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from puzzle_core.errors import DataError
from puzzle_core.records import Record, canonical_json
from puzzle_core.text_files import read_text


class Item(Record):
    """One question: a `query` with its `choices`, or `contexts` with the `continuation` that they share.

    `label` is the number of the right choice or context, counted from 0. Other keys of a line are ignored.
    """

    query: str | None = None
    choices: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    continuation: str | None = None
    label: int = Field(ge=0, strict=True)

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        given = {name for name, value in self if name != "label" and value not in (None, ())}
        if given - {"query"} != {"choices"} and given != {"contexts", "continuation"}:
            raise ValueError("an item has `query` and `choices`, or `contexts` and `continuation`")
        options = self.options()
        if len(options) < 2 or self.label >= len(options):
            raise ValueError(f"label {self.label} with {len(options)} choices: give two or more, and a label of one")
        if not all(continuation.strip() for _, continuation in options):
            raise ValueError("a choice is empty")
        return self

    def options(self) -> list[tuple[str, str]]:
        """Context and continuation of every choice."""
        if self.continuation is not None:
            return [(context, self.continuation) for context in self.contexts]
        return [(self.query or "", choice) for choice in self.choices]


def read_items(file: Path, limit: int | None = None) -> list[Item]:
    """The items of a file of JSON Lines, plain or compressed by gzip, bzip2 or xz; the first `limit` of them.

    Raises:
        DataError: the file is missing, empty or damaged, or a line is no item; names the line.
    """
    if not file.is_file():
        raise DataError(f"benchmark file {file} does not exist: give a file of JSON Lines (docs/formats.md)")
    items: list[Item] = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        if limit is not None and len(items) == limit:
            break
        try:
            items.append(_item(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            said = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
            raise DataError(f"{file}, line {number} is no item ({said}); docs/formats.md has the form") from error
    if not items:
        raise DataError(f"benchmark file {file} has no items: give a file of JSON Lines (docs/formats.md)")
    return items


def _item(line: str) -> Item:
    """The item of a line.

    Raises:
        ValidationError: it is no item.
    """
    with contextlib.suppress(json.JSONDecodeError):
        content = json.loads(line)
        if isinstance(content, dict):
            line = json.dumps({name: value for name, value in content.items() if name in Item.model_fields})
    return Item.model_validate_json(line)


def digest_items(items: Sequence[Item]) -> str:
    """Hex digest of items in their order. Neither the file's name nor its compression is part of it."""
    content = canonical_json([item.model_dump(mode="json") for item in items])
    return hashlib.sha256(content.encode()).hexdigest()[:40]
