"""Lineage in MLflow: logged models that carry the key of their artifacts, links between them, registered versions.

There is one logged model per key. It names the keys of the models that it was made from, its sources; these are the
edges of the lineage, from a parent to exported files. Every function may be called again for the same model, and then
adds only what is missing.
"""

import hashlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion

from tasks.tracking.loadable import Checkpoint

KEY_TAG, FROM_TAG, HEADLINE_TAG = "puzzle.key", "puzzle.from", "puzzle.headline"
VERSIONS_TAG = "mlflow.modelVersions"
"""A child's registered version, which MLflow's pages show. MLflow's server sets this tag; a bare database does not."""
WHOLE_TAG = "puzzle.whole"
"""Of a model that has all its files and its curve."""
SOURCE_TAG, OWN_ARTIFACTS = "puzzle.source", "artifacts"
"""Of a child that MLflow loads: the source of its versions, if that is not the place of its own artifacts."""
ANSWER_TAG, CHAMPION_TAG = "puzzle.answer.", "puzzle.champion."
"""Tags of a version, with the alias of a target and scenario: it has answered these, and was once their champion."""
CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest child of a parent, and the one that was promoted last; the latter also for each pair."""
NOTE_TAG = "mlflow.note.content"
MOST_LINKS = 50
LONGEST_ALIAS = 200
"""MLflow takes 255 characters, and 250 in the name of the tag that says which answer a version was."""
Values = list[tuple[str, float, int]]
"""Metrics: name, value, step."""
OLDEST_FIRST = [{"field_name": "creation_timestamp", "ascending": True}]


@dataclass(frozen=True)
class TrackedModel:
    """A step of the lineage, to be logged as a model. `files` (text by name) and `curve` are computed if needed.

    `checkpoint` is that of a child, which MLflow then loads. `results` are figures of its quality and speed by name.
    """

    kind: str
    name: str
    key: str
    sources: tuple[str, ...] = ()
    headline: str = ""
    about: Mapping[str, object] = field(default_factory=dict)
    files: Callable[[], dict[str, str]] = dict
    curve: Callable[[], Values] = list
    checkpoint: Checkpoint | None = None
    results: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """A child as a version of the registered model `name`; `alias` names the target and scenario that it answers.

    `is_champion` says whether it passes the gate of its specification.
    """

    name: str
    about_name: str
    alias: str
    description: str
    tags: dict[str, str]
    is_champion: bool = False


def note_model(client: MlflowClient, experiment: str, model: TrackedModel, made_by: str | None) -> LoggedModel:
    """Find the logged model of this key, or log it, and add the sources and the headline that it lacks.

    Args:
        client: of MLflow.
        experiment: its id.
        model: what to log.
        made_by: the id of the run that made it; none where no tracked run did.
    """
    logged = find_model(client, experiment, model.key)
    if logged is None:
        params = {name: str(value)[:500] for name, value in ({"key": model.key} | dict(model.about)).items()}
        logged = client.create_logged_model(
            experiment, allowed_name(model.name), source_run_id=made_by, tags={KEY_TAG: model.key}, params=params,
            model_type=model.kind,
        )  # fmt: skip
    sources = dict.fromkeys([*sources_of(logged), *model.sources])
    wanted = {FROM_TAG: " ".join(sources), HEADLINE_TAG: model.headline}
    if changed := {tag: text for tag, text in wanted.items() if text and logged.tags.get(tag) != text}:
        client.set_logged_model_tags(logged.model_id, changed)
    return logged


def complete_model(
    client: MlflowClient, model: TrackedModel, logged: LoggedModel, log_curve: Callable[[Values], None]
) -> None:
    """Log a model's curve and files and set it READY, unless that was done before."""
    if WHOLE_TAG in logged.tags:
        return
    log_curve(model.curve())
    with tempfile.TemporaryDirectory() as directory:
        for name, text in model.files().items():
            (Path(directory) / name).write_text(text)
        client.log_model_artifacts(logged.model_id, directory)
    client.finalize_logged_model(logged.model_id, "READY")
    client.set_logged_model_tags(logged.model_id, {WHOLE_TAG: "yes"})


def make_loadable(client: MlflowClient, model: TrackedModel, logged: LoggedModel) -> LoggedModel:
    """Make a child a model that MLflow loads, unless it is one; returns the logged model with its tags."""
    if model.checkpoint is None or SOURCE_TAG in logged.tags:
        return logged
    source = model.checkpoint.publish(logged, {KEY_TAG: model.key, HEADLINE_TAG: model.headline})
    client.set_logged_model_tags(logged.model_id, {SOURCE_TAG: source or OWN_ARTIFACTS})
    return client.get_logged_model(logged.model_id)


def find_model(client: MlflowClient, experiment: str, key: str) -> LoggedModel | None:
    """The oldest logged model of a key in an experiment; none where there is none."""
    only = f"tags.`{KEY_TAG}` = '{key}'"
    models = client.search_logged_models([experiment], filter_string=only, max_results=1, order_by=OLDEST_FIRST)
    return models[0] if models else None


def all_models(client: MlflowClient, experiments: list[str]) -> Iterator[LoggedModel]:
    """Every logged model with a key, the oldest first."""
    token = None
    while True:
        page = client.search_logged_models(experiments, order_by=OLDEST_FIRST, page_token=token)
        yield from (model for model in page if KEY_TAG in model.tags)
        token = page.token
        if not token:
            return


def link_models(client: MlflowClient, experiment: str) -> None:
    """Write a description on every model's page, with links to its sources and to the models made from it."""
    models = by_key(all_models(client, [experiment]))
    products = products_of(models)
    for key, model in models.items():
        sources = [models[source] for source in sources_of(model) if source in models]
        made = [models[product] for product in products[key]]
        paragraphs = [model.tags.get(HEADLINE_TAG, ""), f"Artifact key: `{key}`"]
        paragraphs += [_links("Made from", sources), _links("Led to", made), _registered_text(model)]
        text = "\n\n".join(filter(None, paragraphs))
        if model.tags.get(NOTE_TAG) != text:
            client.set_logged_model_tags(model.model_id, {NOTE_TAG: text})


def register(client: MlflowClient, child: LoggedModel, version: Version, run: str) -> None:
    """Register a child as a version, unless it is one, and set the alias to it if it is a new answer.

    A run that repeats an older answer leaves the alias unchanged.
    """
    key, page = child.tags[KEY_TAG], f"#/experiments/{child.experiment_id}/models/{child.model_id}"
    if not client.search_registered_models(f"name = '{version.name}'"):
        client.create_registered_model(version.name, description=version.about_name)
    known = _versions(client, version.name, key)
    if not known:
        source = child.tags.get(SOURCE_TAG, OWN_ARTIFACTS)
        source = child.artifact_location if source == OWN_ARTIFACTS else source
        about = f"{version.description}\n\nIts card, and what it came from: [{child.name}]({page})"
        client.create_model_version(
            version.name, source, run_id=child.source_run_id or run, model_id=child.model_id,
            tags={KEY_TAG: key} | version.tags, description=about,
        )  # fmt: skip
        known = _versions(client, version.name, key)
    first, *others = known
    for other in others:  # two runs have registered it at the same time
        client.delete_model_version(version.name, other.version)
    shown = json.dumps([{"name": version.name, "version": str(first.version)}])
    if shown != child.tags.get(VERSIONS_TAG):
        client.set_logged_model_tags(child.model_id, {VERSIONS_TAG: shown})
    answer_for = f"{ANSWER_TAG}{version.alias}"
    if answer_for not in first.tags:
        for alias in (version.alias, CANDIDATE):
            client.set_registered_model_alias(version.name, alias, first.version)
        client.set_model_version_tag(version.name, first.version, answer_for, "yes")
    if version.is_champion and f"{CHAMPION_TAG}{version.alias}" not in first.tags:
        promote(client, first, version.alias)


def promote(client: MlflowClient, version: ModelVersion, alias: str) -> list[str]:
    """Make a version the champion of its registered model, and that of the target and scenario that `alias` names.

    Returns:
        The aliases that name the version now.
    """
    aliases = [CHAMPION, f"{CHAMPION}-{alias}"]
    for name in aliases:
        client.set_registered_model_alias(version.name, name, version.version)
    client.set_model_version_tag(version.name, version.version, f"{CHAMPION_TAG}{alias}", "yes")
    return aliases


def sources_of(model: LoggedModel) -> list[str]:
    """The keys of the models that a model was made from."""
    keys: list[str] = model.tags.get(FROM_TAG, "").split()
    return keys


def by_key(models: Iterable[LoggedModel]) -> dict[str, LoggedModel]:
    """Models by key, the first of those of one key."""
    return {model.tags[KEY_TAG]: model for model in reversed(list(models))}


def products_of(models: dict[str, LoggedModel]) -> dict[str, list[str]]:
    """The keys of the models that were made from each key."""
    products = defaultdict(list)
    for key, model in models.items():
        for source in sources_of(model):
            products[source].append(key)
    return products


def allowed_name(text: str) -> str:
    """The text with characters replaced that MLflow does not take in names of models and aliases; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "unnamed"


def alias_of(target: str, scenario: str) -> str:
    """The alias of a target and a scenario, `TARGET-SCENARIO`: no two pairs of names have the same.

    MLflow takes letters, digits, `_` and `-`. Other characters, `_` itself, and `-` of a scenario are written as `_`
    and two hex digits, so the last `-` is what joins the names.
    """
    alias = f"{_escaped(target, '-')}-{_escaped(scenario)}"
    if len(alias) <= LONGEST_ALIAS:
        return alias
    return f"{alias[: LONGEST_ALIAS - 42]}_x{hashlib.sha256(alias.encode()).hexdigest()[:40]}"


def _escaped(name: str, kept: str = "") -> str:
    return re.sub(rf"[^A-Za-z0-9{kept}]", lambda found: f"_{ord(found[0]):02x}", name)


def _versions(client: MlflowClient, name: str, key: str) -> list[ModelVersion]:
    """The registered versions of a key, the oldest first."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'")
    return sorted(versions, key=lambda version: int(version.version))


def _links(title: str, models: list[LoggedModel]) -> str:
    lines = [f"- {m.model_type} [{m.name}](#/experiments/{m.experiment_id}/models/{m.model_id})" for m in models]
    more = [f"- and {len(lines) - MOST_LINKS} more"] if len(lines) > MOST_LINKS else []
    return "\n".join([f"{title}:", "", *lines[:MOST_LINKS], *more]) if lines else ""


def registered(model: LoggedModel) -> list[tuple[str, str]]:
    """Name and number of every registered version of a model."""
    return [(version["name"], version["version"]) for version in json.loads(model.tags.get(VERSIONS_TAG, "[]"))]


def _registered_text(model: LoggedModel) -> str:
    links = [f"[{name} {number}](#/models/{name}/versions/{number})" for name, number in registered(model)]
    return f"Registered: {', '.join(links)}" if links else ""
