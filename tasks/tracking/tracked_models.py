"""What outlives a run in MLflow: logged models that carry the key of their artifacts, their links, registered versions.

A model is noted once per key and found again, and it names the keys of what it was made from: those are the edges of
the lineage, from a parent to exported files. All functions may be called again for what was noted before, and then
add only what is missing. They take an `MlflowClient`; tasks/tracking/tracking.py has it, and calls them.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY_TAG, FROM_TAG, HEADLINE_TAG = "puzzle.key", "puzzle.from", "puzzle.headline"
VERSIONS_TAG = "mlflow.modelVersions"
"""Of a child: its registered version, as MLflow's pages show it; its server sets this, its database alone does not."""
WHOLE_TAG = "puzzle.whole"
NOTE_TAG = "mlflow.note.content"
MOST_LINKS = 50
Values = list[tuple[str, float, int]]


@dataclass(frozen=True)
class Model:
    """A step of the lineage as MLflow is to know it. What is costly to say is said when it is asked for."""

    kind: str
    name: str
    key: str
    sources: tuple[str, ...] = ()
    headline: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    files: Callable[[], dict[str, str]] = dict
    curve: Callable[[], Values] = list


@dataclass(frozen=True)
class Version:
    """A child as a version of the registered model of its parent, and what it is the answer for."""

    name: str
    family: str
    alias: str
    description: str
    tags: dict[str, str]


def note_model(client: Any, experiment: str, model: Model, made_by: str | None) -> Any:
    """Find the model of this key, or log it.

    Args:
        made_by: the run that made it; none for what was found.
    """
    found = find_model(client, experiment, model.key)
    if found is None:
        params = {name: str(value)[:500] for name, value in ({"key": model.key} | model.about).items()}
        found = client.create_logged_model(
            experiment, model.name, source_run_id=made_by, tags={KEY_TAG: model.key}, params=params,
            model_type=model.kind,
        )  # fmt: skip
    sources = dict.fromkeys([*found.tags.get(FROM_TAG, "").split(), *model.sources])
    wanted = {FROM_TAG: " ".join(sources), HEADLINE_TAG: model.headline}
    if changed := {tag: text for tag, text in wanted.items() if text and found.tags.get(tag) != text}:
        client.set_logged_model_tags(found.model_id, changed)
    return found


def complete_model(client: Any, model: Model, logged: Any, log_curve: Callable[[Values], None]) -> None:
    """Give a model its curve and files and call it ready, unless that was done."""
    if WHOLE_TAG in logged.tags:
        return
    log_curve(model.curve())
    with tempfile.TemporaryDirectory() as directory:
        for name, text in model.files().items():
            (Path(directory) / name).write_text(text)
        client.log_model_artifacts(logged.model_id, directory)
    client.finalize_logged_model(logged.model_id, "READY")
    client.set_logged_model_tags(logged.model_id, {WHOLE_TAG: "yes"})


def find_model(client: Any, experiment: str, key: str) -> Any:
    """The model of a key, the first one of an experiment; none where there is none."""
    oldest_first = [{"field_name": "creation_timestamp", "ascending": True}]
    only = f"tags.`{KEY_TAG}` = '{key}'"
    found = client.search_logged_models([experiment], filter_string=only, max_results=1, order_by=oldest_first)
    return found[0] if found else None


def all_models(client: Any, experiments: list[str]) -> Iterator[Any]:
    """Every model with a key, the oldest first."""
    token, oldest_first = None, [{"field_name": "creation_timestamp", "ascending": True}]
    while True:
        page = client.search_logged_models(experiments, order_by=oldest_first, page_token=token)
        yield from (model for model in page if KEY_TAG in model.tags)
        token = page.token
        if not token:
            return


def link_models(client: Any, experiment: str) -> None:
    """Describe every model on its page, with links to what it was made from and to what was made from it."""
    models = {model.tags[KEY_TAG]: model for model in reversed(list(all_models(client, [experiment])))}
    led_to = defaultdict(list)
    for model in models.values():
        for source in model.tags.get(FROM_TAG, "").split():
            led_to[source].append(model)
    for key, model in models.items():
        sources = [models[source] for source in model.tags.get(FROM_TAG, "").split() if source in models]
        said = [model.tags.get(HEADLINE_TAG, ""), f"Artifact key: `{key}`"]
        said += [_links("Made from", sources), _links("Led to", led_to[key]), _registered(model)]
        text = "\n\n".join(filter(None, said))
        if model.tags.get(NOTE_TAG) != text:
            client.set_logged_model_tags(model.model_id, {NOTE_TAG: text})


def register(client: Any, child: Any, version: Version, run: str) -> None:
    """Make a child a version of its family, unless it is one; point the alias to it if this answer is new.

    A second run of an older answer leaves the alias where it is.
    """
    key, page = child.tags[KEY_TAG], f"#/experiments/{child.experiment_id}/models/{child.model_id}"
    if not client.search_registered_models(f"name = '{version.name}'"):
        client.create_registered_model(version.name, description=version.family)
    known = _versions(client, version.name, key)
    if not known:
        about = f"{version.description}\n\nIts card, and what it came from: [{child.name}]({page})"
        client.create_model_version(
            version.name, child.artifact_location, run_id=child.source_run_id or run, model_id=child.model_id,
            tags={KEY_TAG: key} | version.tags, description=about,
        )  # fmt: skip
        known = _versions(client, version.name, key)
    first, *others = known
    for other in others:  # two runs at once have registered it
        client.delete_model_version(version.name, other.version)
    where = json.dumps([{"name": version.name, "version": str(first.version)}])
    if where != child.tags.get(VERSIONS_TAG):
        client.set_logged_model_tags(child.model_id, {VERSIONS_TAG: where})
    answer_for = f"puzzle.answer.{version.alias}"
    if answer_for not in first.tags:
        client.set_registered_model_alias(version.name, version.alias, first.version)
        client.set_model_version_tag(version.name, first.version, answer_for, "yes")


def sources_of(model: Any) -> list[str]:
    """The keys of what a model was made from."""
    found: list[str] = model.tags.get(FROM_TAG, "").split()
    return found


def allowed_name(text: str) -> str:
    """A text as names of registered models and aliases may be."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")


def _versions(client: Any, name: str, key: str) -> list[Any]:
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'")
    return sorted(found, key=lambda version: int(version.version))


def _links(title: str, models: list[Any]) -> str:
    lines = [f"- {m.model_type} [{m.name}](#/experiments/{m.experiment_id}/models/{m.model_id})" for m in models]
    more = [f"- and {len(lines) - MOST_LINKS} more"] if len(lines) > MOST_LINKS else []
    return "\n".join([f"{title}:", "", *lines[:MOST_LINKS], *more]) if lines else ""


def registered(model: Any) -> list[tuple[str, str]]:
    """Name and number of every registered version of a model."""
    return [(version["name"], version["version"]) for version in json.loads(model.tags.get(VERSIONS_TAG, "[]"))]


def _registered(model: Any) -> str:
    found = [f"[{name} {number}](#/models/{name}/versions/{number})" for name, number in registered(model)]
    return f"Registered: {', '.join(found)}" if found else ""
