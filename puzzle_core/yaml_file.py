"""Records in YAML files. One error lists all invalid keys and values, with the nearest known keys."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from puzzle_core.credentials import redacted
from puzzle_core.errors import SpecError

SchemaModel = TypeVar("SchemaModel", bound=BaseModel)

RENAMED_KEYS = {"form": "constraints"}
"""Old names of keys. A record that has the new key refuses the old key and names the new one."""


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_keys(path: Path, what: str, hint: str) -> dict[str, Any]:
    """The keys and values of a YAML file, without validation.

    Args:
        what: the kind of file, for error texts: "spec", "target".
        hint: the first line of such a file, for error texts.

    Raises:
        SpecError: the file is missing, not YAML, or holds no keys.
    """
    try:
        content = _OnceLoader(path.read_text(encoding="utf-8-sig")).get_single_data()
    except OSError as error:
        raise SpecError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, bytes of no text
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds no keys: {hint}")
    return content


def yaml_text(content: dict[str, Any]) -> str:
    """Keys and values as YAML, in their order."""
    return str(yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True))


def parse_record(model: type[SchemaModel], content: dict[str, Any], origin: str, what: str) -> SchemaModel:
    """Validate a record given as plain values.

    Raises:
        SpecError: lists every wrong key and value, one per line.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [_explain(dict(e), model, what) for e in error.errors(include_url=False)]
        raise SpecError(f"{origin} is not a valid {what}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def refuse_unknown(content: dict[str, Any], model: type[BaseModel], origin: str, what: str) -> None:
    """Refuse keys that no field of `model` has, without a look at values.

    Raises:
        SpecError: lists every unknown key with the nearest known one, one per line.
    """
    unknown = [key for key in content if key not in model.model_fields]
    if unknown:
        lines = [f"  {key}: {_unknown_key(str(key), list(model.model_fields))}" for key in unknown]
        raise SpecError(f"{origin} is not a valid {what}:\n" + "\n".join(lines))


def resolve_path(value: Any, directory: Path) -> Any:
    """The absolute path of `value` if it exists in `directory`, otherwise `value` unchanged."""
    exists = isinstance(value, str) and (directory / value).exists()
    return str((directory / value).resolve()) if exists else value


def _explain(error: dict[str, Any], model: type[BaseModel], what: str) -> str:
    place = ".".join(str(part) for part in error["loc"]) or what
    if error["type"] == "extra_forbidden":
        return f"{place}: {_unknown_key(str(error['loc'][-1]), _fields_at(model, error['loc'][:-1]))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "string_type" and not isinstance(error["input"], dict | list | None):
        message += ": put it in quotes"
    if isinstance(error["input"], dict) or error["type"] == "missing":
        return f"{place}: {message}"
    return f"{place}: {message} (found {redacted(repr(error['input']))})"


def _unknown_key(key: str, known: list[str]) -> str:
    """What is wrong with a key that is none of these."""
    if RENAMED_KEYS.get(key) in known:
        return f"`{key}` is now `{RENAMED_KEYS[key]}`"
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(known)}"
    columns = "; a column of the cost table goes under `columns`" if "columns" in known else ""
    return f"unknown key; {hint}{columns}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            annotation: Any = model.model_fields[part].annotation
            model = next(
                (a for a in (annotation, *getattr(annotation, "__args__", ())) if _is_record(a)),
                model,
            )
    return list(model.model_fields)


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
