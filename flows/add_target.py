"""A new hardware target, or one with traffic of its own, from a form: stored beside the artifacts, then searched."""

import logging
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from flows.permissions import permitted_store
from flows.services.orphaned_runs import inherited_tags, label_process
from puzzle_core.spec import RuntimeSpec, ScenarioSpec
from puzzle_core.target import TargetSpec
from tasks.announce import announce
from tasks.store.store import Store
from tasks.store.stored_targets import StoredTarget, store_target

log = logging.getLogger("puzzle")
DEFAULT_STORE = RuntimeSpec().store
StoreUrl = Annotated[str, Field(json_schema_extra=RuntimeSpec.model_fields["store"].json_schema_extra)]


@flow(
    name="add-target",
    flow_run_name="add target {target.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def add_target(
    target: TargetSpec,
    scenario: ScenarioSpec | None = None,
    store: StoreUrl = DEFAULT_STORE,
    replace: bool = False,
) -> str:
    """Store a hardware target for the next re-search, which its event starts where the server has the automation.

    Args:
        target: The hardware target; costs are a data sheet's (`roofline`), imported, or measured where it is searched.
        scenario: Traffic and limits for this target; none for those of the specification that is searched.
        store: The artifact store that re-searches read.
        replace: Whether a target of this name may be there already, and is replaced.

    Returns:
        The path of the target's object in the store.

    Raises:
        SpecError: the worker does not allow the store, or the store has another target of this name.
    """
    runtime = RuntimeSpec(store=permitted_store(store))
    stored = StoredTarget(target=target, scenario=scenario, added_by=flow_run.get_name() or "")
    opened = Store.of(runtime)
    path = store_target(opened, stored, replace)
    log.info("target %s is in %s as %s", target.name, opened.place, path)
    announce("target.added", stored.name, {"store": runtime.store, "path": path})
    return path
