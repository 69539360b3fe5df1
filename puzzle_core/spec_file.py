"""Reads a run specification from a YAML file, with overrides from the command line."""

from pathlib import Path
from typing import Any

import yaml

from puzzle_core.errors import SpecError
from puzzle_core.spec import RunSpec, parse_spec
from puzzle_core.target import load_target
from puzzle_core.yaml_file import read_keys, resolve_path


def load_spec(path: Path, overrides: tuple[str, ...] = ()) -> RunSpec:
    """Read a spec from YAML, with `part.field=value` overrides.

    `target` may be the path of a target file (puzzle_core/target.py). Relative paths of the parent, texts,
    benchmarks and target start at the file's directory; those in overrides start at the working directory.

    Raises:
        SpecError: the file is missing or not YAML, or a key or value is wrong; names the key and the nearest known one.
    """
    content = read_keys(path, "spec", "a spec starts with `parent:` (see deployments/specs/quickstart.yaml)")
    _resolve_paths(content, path.resolve().parent)
    _read_target(content, path.resolve().parent)
    for override in overrides:
        _apply_override(content, override)
    _read_target(content, Path())
    return parse_spec(content, str(path))


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise SpecError(f"--set {override!r}: write part.field=value, for instance --set parent.path=/models/mine")
    *parents, last = key.split(".")
    place = content
    for part in parents:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise SpecError(f"--set {override!r}: {part!r} holds a value, not keys")
    try:
        place[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"--set {override!r}: the value is not YAML: {error}") from error


def _read_target(content: dict[str, Any], directory: Path) -> None:
    """Replace the path of a target file by the content of the file."""
    target = content.get("target")
    if isinstance(target, str):
        content["target"] = load_target(directory / target).model_dump(mode="json", exclude_unset=True)


def _resolve_paths(content: dict[str, Any], directory: Path) -> None:
    parent, data = content.get("parent"), content.get("data")
    if isinstance(parent, dict) and "path" in parent:
        parent["path"] = resolve_path(parent["path"], directory)
    for key in ("train_texts", "held_out_texts"):
        if isinstance(data, dict) and isinstance(data.get(key), list):
            data[key] = [resolve_path(text, directory) for text in data[key]]
    evaluation = content.get("evaluation")
    if isinstance(evaluation, dict):
        tasks, options = evaluation.get("tasks"), evaluation.get("lm_eval")
        named = [(task, "file") for task in tasks] if isinstance(tasks, list) else []
        for part, key in [*named, (options, "task_folder")]:
            if isinstance(part, dict) and key in part:
                part[key] = resolve_path(part[key], directory)
