"""The lineage of one child, read from MLflow: found by key, name or alias, from its parent to exported files.

Only MLflow is read for it, so it is known even without the store. The store is listed only to say what it lacks.
"""

import csv
import io
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion

from puzzle_core.errors import SpecError, StorageError
from puzzle_core.spec import RuntimeSpec
from tasks.store.references import reachable
from tasks.store.store import Store
from tasks.tracking.lineage_steps import TABLE
from tasks.tracking.mlflow_client import experiment_ids, mlflow_client, model_text
from tasks.tracking.tracked_models import (
    HEADLINE_TAG,
    KEY_TAG,
    all_models,
    allowed_name,
    by_key,
    products_of,
    registered,
    sources_of,
)


class Artifact(NamedTuple):
    """One artifact of a step: its key, its store, and which run made it when."""

    key: str
    store: str
    made_by: str
    made_at: str


class Step(NamedTuple):
    """One step of the lineage; it is shown below the first of its sources."""

    kind: str
    name: str
    key: str
    headline: str
    noted_at: str
    sources: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    registered: tuple[str, ...]
    path: str | None


def lineage_of(uri: str, name: str) -> list[Step]:
    """The steps that a child was made from, the child, and the steps made from it, each after its sources.

    Args:
        uri: MLflow's tracking URI.
        name: a key, the name of a model or a specification, NAME, NAME/NUMBER or NAME@ALIAS of a registered model,
            or an alias alone.

    Raises:
        SpecError: there is no child of that name; lists the names.
    """
    client = mlflow_client(uri)
    models, child = known_child(client, uri, name)
    family = by_key(model for model in models if model.experiment_id == child.experiment_id)
    sources = {key: sources_of(model) for key, model in family.items()}
    wanted = {key for edges in (sources, products_of(family)) for key in _reachable(child.tags[KEY_TAG], edges)}
    return [_step(client, uri, family[key]) for key in _in_order(wanted & family.keys(), family)]


def known_child(client: MlflowClient, uri: str, name: str) -> tuple[list[LoggedModel], LoggedModel]:
    """All models, and the child of this name.

    Raises:
        SpecError: there is none; lists the names.
    """
    models = list(all_models(client, experiment_ids(client)))
    child = find_child(client, models, name)
    if child is None:
        names = sorted({str(model.name) for model in models if model.model_type == "child"})
        names += sorted(model.name for model in client.search_registered_models())
        raise SpecError(f"MLflow at {uri} knows no child {name!r}; it knows {', '.join(names) or 'none'}")
    return models, child


def missing(steps: Iterable[Step], store: str | None) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Keys of artifacts that their stores lack, by step, and the stores that could not be listed, with the reason.

    Args:
        steps: of a lineage.
        store: look in this store instead of the one that MLflow names for each artifact.
    """
    gone, unreachable, stored = dict[str, list[str]](), dict[str, str](), dict[str, set[str]]()
    for step in steps:
        for artifact in step.artifacts:
            url = store or artifact.store
            if url not in stored:
                stored[url], reason = _keys(url)
                unreachable |= {url: reason} if reason else {}
            if url not in unreachable and artifact.key not in stored[url]:
                gone.setdefault(step.key, []).append(artifact.key)
    return gone, unreachable


def find_child(client: MlflowClient, models: list[LoggedModel], name: str) -> LoggedModel | None:
    """The model of this key, registered name or alias, or the newest model of this name."""
    models_by_key = by_key(models)
    if name in models_by_key:
        return models_by_key[name]
    for registered_model in client.search_registered_models():
        family = registered_model.name
        all_versions = client.search_model_versions(f"name = '{family}'")
        versions = {str(version.version): version for version in all_versions if KEY_TAG in version.tags}
        aliases = {alias: versions.get(str(number)) for alias, number in registered_model.aliases.items()}
        labels: dict[str, ModelVersion | None] = {f"{family}/{number}": versions[number] for number in versions}
        labels |= {family: versions[max(versions, key=int)]} if versions else {}
        labels |= aliases | {f"{family}@{alias}": version for alias, version in aliases.items()}
        if version := labels.get(name):
            return models_by_key.get(version.tags[KEY_TAG])
    named = [model for model in models if model.name in (allowed_name(f"child-{name}"), name, allowed_name(name))]
    return named[-1] if named else None


def _step(client: MlflowClient, uri: str, model: LoggedModel) -> Step:
    rows = csv.DictReader(io.StringIO(model_text(uri, model, TABLE) or ""))
    artifacts = [Artifact(r["key"], r["uri"].removesuffix(f"/{r['key']}"), r["made_by"], r["made_at"]) for r in rows]
    versions = []
    for name, number in registered(model):
        version = client.get_model_version(name, number)
        versions.append(" ".join([f"{name} {number}", *(f"@{alias}" for alias in version.aliases)]))
    return Step(
        kind=str(model.model_type),
        name=str(model.name),
        key=model.tags[KEY_TAG],
        headline=model.tags.get(HEADLINE_TAG, ""),
        noted_at=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(model.creation_timestamp / 1000)),
        sources=tuple(sources_of(model)),
        artifacts=tuple(artifacts),
        registered=tuple(versions),
        path=model.params.get("path"),
    )


def _reachable(key: str, edges: Mapping[str, list[str]]) -> set[str]:
    return reachable([key], lambda frontier: (end for start in frontier for end in edges.get(start, ())))


def _in_order(wanted: set[str], family: dict[str, LoggedModel]) -> list[str]:
    """Keys in the order of their creation, each after its sources."""
    done: list[str] = []
    left = sorted(wanted, key=lambda key: family[key].creation_timestamp)
    while left:
        ready = next((k for k in left if all(s in done or s not in wanted for s in sources_of(family[k]))), left[0])
        left.remove(ready)
        done.append(ready)
    return done


def _keys(url: str) -> tuple[set[str], str]:
    """All keys of a store, and why it cannot be listed, or an empty text."""
    if "://" not in url and not Path(url).is_dir():
        return set(), "there is no such directory here"
    try:
        return Store.of(RuntimeSpec(store=url)).keys(), ""
    except StorageError as error:
        return set(), str(error)
