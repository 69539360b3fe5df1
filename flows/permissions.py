"""What a run that a worker started may name: peers, code and places come from the worker's side, not from a form.

Whoever may fill in a form need not be the owner of the worker's machine. A specification of the command line may name
anything, since its user owns the process. In a run of a deployment every key of GUARDED has its default, or one of the
values that the worker's environment allows, or a place below one that ends with `/*`.
"""

import functools
import json
import os
import re
from typing import Any, TypeVar

from prefect.context import FlowRunContext

from puzzle_core.errors import SpecError
from puzzle_core.spec import RunSpec, RuntimeSpec

V = TypeVar("V")
ALLOWED = "PUZZLE_ALLOWED"
"""Environment variable of a worker: JSON with a list of values for keys of GUARDED."""
PLACES = ("runtime.store", "runtime.scratch", "runtime.mlflow_uri")
"""A form that leaves one of these at its default gets the first value that the worker allows."""
GUARDED = (
    *PLACES,
    "runtime.dask_address",
    "runtime.gkd_rendezvous",
    "parent.allow_remote_code",
    "evaluation.lm_eval.task_folder",  # YAML files of lm-evaluation-harness may name Python functions
)


def permitted(spec: RunSpec) -> RunSpec:
    """The specification with the worker's places, in a run that a worker started; as it is in any other run.

    Raises:
        SpecError: a key names what the worker does not allow; the text says what to set on the worker.
    """
    if not _worker_started():
        return spec
    allowed = _allowed()
    for key in GUARDED:
        *parts, name = key.split(".")
        record = functools.reduce(getattr, parts, spec)
        value, default = getattr(record, name), type(record).model_fields[name].default
        if (chosen := _permitted(key, value, default, allowed.get(key, []))) != value:
            spec = spec.model_copy(update={parts[0]: record.model_copy(update={name: chosen})})
    return spec


def permitted_store(store: str) -> str:
    """As `permitted`, for a form that asks for the store alone.

    Raises:
        SpecError: the worker does not allow the store.
    """
    key, default = "runtime.store", RuntimeSpec().store
    return _permitted(key, store, default, _allowed().get(key, [])) if _worker_started() else store


def _permitted(key: str, value: V, default: V, values: list[str]) -> V | str:
    """The value of a key, or the worker's place for one that is left at its default.

    Raises:
        SpecError: the worker does not allow the value.
    """
    if value == default:
        places = [other for other in values if key in PLACES and not other.endswith("*")]
        return places[0] if places else value
    if not any(_matches(str(value), other) for other in values):
        raise SpecError(
            f"{key} is {value!r}, which this worker does not allow: leave it out, take one of "
            f"{values or 'its defaults'}, or have the worker's owner set {ALLOWED}='{json.dumps({key: [value]})}' "
            "in its environment"
        )
    return value


def _matches(value: str, allowed: str) -> bool:
    """Whether a value is the allowed one, or lies below an allowed place that ends with `/*`."""
    if not allowed.endswith("/*") or not value.startswith(allowed[:-1]):
        return value == allowed
    below = value.removeprefix(allowed[:-1])
    return re.fullmatch(r"[\w./-]+", below) is not None and ".." not in below.split("/")


def _worker_started() -> bool:
    """Whether the flow run of this process is a deployment's or was started by a worker."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID") or (run and run.deployment_id))


def _allowed() -> dict[str, list[str]]:
    """The values that this process's environment allows, by key.

    Raises:
        SpecError: the variable is not a JSON object of lists of texts, or names another key.
    """
    text = os.environ.get(ALLOWED) or "{}"
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"{ALLOWED} of this worker is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() <= set(GUARDED):
        raise SpecError(f"{ALLOWED} of this worker must be an object with keys of: {', '.join(GUARDED)}")
    for key, values in content.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise SpecError(f"{ALLOWED} of this worker: {key} must be a list of texts")
    return content
