"""The MLflow run of a flow run: one per flow run, nested as the flows are. Tasks write to it through `TrackedRun`."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from puzzle_core.credentials import redacted
from puzzle_core.errors import TrackingError
from puzzle_core.records import canonical_json
from puzzle_core.spec import RunSpec
from tasks.tracking.mlflow_client import mlflow_client
from tasks.tracking.place import tracking_uri
from tasks.tracking.tracked_models import TrackedModel, find_model
from tasks.tracking.tracked_run import TrackedRun, start_run

_current: contextvars.ContextVar[TrackedRun | None] = contextvars.ContextVar("tracked_run", default=None)


@contextlib.contextmanager
def tracked(name: str, spec: RunSpec) -> Iterator[TrackedRun]:
    """Open an MLflow run for the present flow run, nested in the one around it; it ends as the block ends.

    Raises:
        TrackingError: `runtime.tracking` is `required`, and MLflow does not answer or did not take a record.
    """
    around, runtime = _current.get(), spec.runtime
    uri = around.uri if around else tracking_uri(runtime.mlflow_uri)
    run = start_run(name, uri, runtime.mlflow_experiment, runtime.scratch, around)
    required = runtime.tracking == "required" and not around
    if required and run.run_id is None:
        run.abandon()
        raise TrackingError(
            f"MLflow at {redacted(uri)} does not answer, and runtime.tracking is `required`: start it, or run with "
            "runtime.tracking=best_effort"
        )
    run.params({"spec_digest": spec.digest(), "parent": spec.parent.path, "target": spec.target.name})
    if not around:
        content = spec.model_dump(mode="json", exclude={"runtime"})  # it changes no result, and may hold a secret
        run.params(_flat(content))
        run.text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "spec.yaml")
        run.monitor()
    token = _current.set(run)
    try:
        yield run
    except BaseException as error:
        run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    else:
        lost = run.end("FINISHED")
        if required and lost:
            raise TrackingError(
                f"{lost} records of this run are not in MLflow at {redacted(uri)}, and runtime.tracking is `required`. "
                "All artifacts are in the store: run again, which computes nothing and records the lineage"
            )
    finally:
        _current.reset(token)


def current_run() -> TrackedRun | None:
    """The innermost open run."""
    return _current.get()


def track_use(uri: str, key: str, name: str, scratch: str, make: Callable[[str], TrackedModel]) -> bool:
    """Log a run that uses the model of this key and makes another model.

    Args:
        uri: MLflow's tracking URI.
        key: of the used model.
        name: of the run.
        scratch: where the end is left if MLflow does not receive it.
        make: returns the made model, given the name of the used one.

    Returns:
        Whether MLflow has a model of this key; without one nothing is logged.

    Raises:
        Exception: whatever MLflow raises where it does not answer.
    """
    client = mlflow_client(uri)
    for experiment in client.search_experiments():
        used = find_model(client, experiment.experiment_id, key)
        if used:
            run = start_run(name, uri, experiment.name, scratch, None)
            run.uses_logged(used)
            run.makes(make(used.name))
            run.end("FINISHED")
            return True
    return False


# `Any`: the values of a specification of any kind, as YAML has them.
def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name; lists as JSON text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = canonical_json(value) if isinstance(value, list) else value
    return flat
