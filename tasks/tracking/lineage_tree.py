"""The lineage of one child as MLflow has it: found by key, name or alias; from its parent down to exported files.

Nothing but MLflow is asked for it, so it is there where the store is not; the store is only looked at to say what is
gone from it.
"""

import csv
import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.errors import SpecError, StorageError
from puzzle_core.spec import RuntimeSpec
from tasks.store.store import Store
from tasks.tracking.lineage_steps import TABLE
from tasks.tracking.tracked_models import HEADLINE_TAG, KEY_TAG, all_models, registered, sources_of
from tasks.tracking.tracking import model_text, tracking_client


class Artifact(NamedTuple):
    """One artifact that a step stands for: its key, the store it was put in, and which run made it when."""

    key: str
    store: str
    made_by: str
    made_at: str


class Step(NamedTuple):
    """One step of the lineage: what it is, what it was made from, the first of which is what it hangs under."""

    kind: str
    name: str
    key: str
    headline: str
    noted_at: str
    sources: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    registered: tuple[str, ...]
    path: str | None


def lineage_of(uri: str, asked: str) -> list[Step]:
    """Everything that a child came from, itself, and what was made from it, each after what it was made from.

    Args:
        uri: MLflow's tracking URI.
        asked: a key, the name of a model or a specification, NAME, NAME/NUMBER or NAME@ALIAS of a registered model,
            or an alias alone.

    Raises:
        SpecError: there is none of that name; says which there are.
    """
    client = tracking_client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    models = list(all_models(client, experiments))
    child = _asked_for(client, models, asked)
    if child is None:
        names = sorted({model.name for model in models if model.model_type == "child"})
        names += sorted(model.name for model in client.search_registered_models())
        raise SpecError(f"MLflow at {uri} knows no child {asked!r}; it knows {', '.join(names) or 'none'}")
    family = {model.tags[KEY_TAG]: model for model in reversed(models) if model.experiment_id == child.experiment_id}
    key = child.tags[KEY_TAG]
    wanted = _reach([key], {name: sources_of(model) for name, model in family.items()})
    led_to = {name: [other for other in family if name in sources_of(family[other])] for name in family}
    wanted |= _reach([key], led_to)
    return [_step(client, uri, family[name]) for name in _ordered(wanted, family)]


def missing(steps: Iterable[Step], store: str | None) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Keys of artifacts that are gone, by step, and the stores that could not be looked at, with the reason.

    Args:
        store: look here, instead of where MLflow says that each artifact was put.
    """
    gone, unreachable, there = dict[str, list[str]](), dict[str, str](), dict[str, set[str]]()
    for step in steps:
        for artifact in step.artifacts:
            url = store or artifact.store
            if url not in there:
                there[url], said = _keys(url)
                unreachable |= {url: said} if said else {}
            if url not in unreachable and artifact.key not in there[url]:
                gone.setdefault(step.key, []).append(artifact.key)
    return gone, unreachable


def _asked_for(client: Any, models: list[Any], asked: str) -> Any:
    """The newest model that this may mean."""
    by_key = {model.tags[KEY_TAG]: model for model in reversed(models)}
    if asked in by_key:
        return by_key[asked]
    for family in client.search_registered_models():
        found = client.search_model_versions(f"name = '{family.name}'")
        versions = {str(version.version): version for version in found if KEY_TAG in version.tags}
        labels = {f"{family.name}/{number}": version for number, version in versions.items()}
        labels |= {family.name: versions[max(versions, key=int)]} if versions else {}
        aliases = {alias: versions.get(str(number)) for alias, number in family.aliases.items()}
        labels |= aliases | {f"{family.name}@{alias}": version for alias, version in aliases.items()}
        if labels.get(asked):
            return by_key.get(labels[asked].tags[KEY_TAG])
    named = [model for model in models if model.name in (f"child-{asked}", asked)]
    return named[-1] if named else None


def _step(client: Any, uri: str, model: Any) -> Step:
    rows = csv.DictReader(io.StringIO(model_text(uri, model, TABLE) or ""))
    artifacts = [Artifact(r["key"], r["uri"].removesuffix(f"/{r['key']}"), r["made_by"], r["made_at"]) for r in rows]
    versions = []
    for name, number in registered(model):
        version = client.get_model_version(name, number)
        versions.append(" ".join([f"{name} {number}", *(f"@{alias}" for alias in version.aliases)]))
    return Step(
        kind=model.model_type,
        name=model.name,
        key=model.tags[KEY_TAG],
        headline=model.tags.get(HEADLINE_TAG, ""),
        noted_at=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(model.creation_timestamp / 1000)),
        sources=tuple(sources_of(model)),
        artifacts=tuple(artifacts),
        registered=tuple(versions),
        path=model.params.get("path"),
    )


def _reach(keys: Iterable[str], edges: dict[str, list[str]]) -> set[str]:
    found, waiting = set[str](), list(keys)
    while waiting:
        key = waiting.pop()
        if key in edges and key not in found:
            found.add(key)
            waiting += edges[key]
    return found


def _ordered(wanted: set[str], family: dict[str, Any]) -> list[str]:
    """Each after all that it was made from, in the order they were noted."""
    done: list[str] = []
    left = sorted(wanted, key=lambda key: family[key].creation_timestamp)
    while left:
        ready = next((k for k in left if all(s in done or s not in wanted for s in sources_of(family[k]))), left[0])
        left.remove(ready)
        done.append(ready)
    return done


def _keys(url: str) -> tuple[set[str], str]:
    """All keys of a store, or why they are not known."""
    if "://" not in url and not Path(url).is_dir():
        return set(), "there is no such directory here"
    try:
        return Store.of(RuntimeSpec(store=url)).keys(), ""
    except StorageError as error:
        return set(), str(error)
