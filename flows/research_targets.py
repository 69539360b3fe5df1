"""Re-search: an architecture for every hardware target that has none yet for the current library and scenario.

Targets come from files and from the store, where the flow `add-target` puts them. New libraries and targets are events
that start a run (prefect.yaml). The schedule is for what no event told of; it is resumed once, by the first run that
finds a library, and left as it is from then on.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from prefect import flow
from prefect.states import Completed

from flows.permissions import permitted
from flows.run_graph import call_flow
from flows.search_architecture import known_plan, search_planned_architecture
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.services.schedules import resume_schedule_once
from flows.submit import plan_run
from puzzle_core.errors import PuzzleError
from puzzle_core.plan import Plan
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import RunSpec
from puzzle_core.target import load_target
from puzzle_core.work import ScoreWork
from tasks.runtime.context import RunContext
from tasks.stage_tasks import for_target
from tasks.store.stored_targets import TARGETS as STORED_TARGETS
from tasks.store.stored_targets import StoredTarget, parsed

log = logging.getLogger("puzzle")
TARGETS = "deployments/targets"
NO_LIBRARY = "NoLibrary"
"""The name of the state that a run ends in while the store lacks the library."""


class TargetSearch(NamedTuple):
    """One target: the plan for it with its search, and that search's record if the store has it.

    `file` says where the target stands. One with an error has no plan, and the error's text.
    """

    file: str
    target: str
    plan: Plan | None
    key: str
    record: SearchRecord | None
    error: str


@flow(
    name="research-targets",
    flow_run_name="targets of {spec.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def research_targets(spec: RunSpec, targets: str = TARGETS) -> dict[str, str]:
    """Search every target without a search for its request, the parent's library and the scenario as they are now.

    While the library is not whole the run ends as completed, in the state `NoLibrary`, and searches nothing.

    Args:
        spec: The run specification; its target is not used. Targets in its store are searched, too.
        targets: Directory of target files.

    Returns:
        The key of every target's search, by the target's name.

    Raises:
        PuzzleError: names every target that failed, once all others are done.
    """
    spec = permitted(spec)
    plan, context = plan_run(spec)
    if lacking := missing_library(plan, context):
        log.info("%s", lacking)
        return cast("dict[str, str]", Completed(name=NO_LIBRARY, message=lacking, data=dict[str, str]()))
    resume_schedule_once()
    searches = find_searches(plan, context, Path(targets))
    keys, errors = {}, []
    for search in searches:
        error = search.error
        if search.record is None and search.plan is not None:
            try:
                call_flow(search_planned_architecture, search.plan, context)
            except PuzzleError as raised:
                error = str(raised)
        else:
            log.info("target %s: %s", search.target, error or f"searched before ({search.key})")
        if error:
            errors.append(f"{search.file}: {error}")
        else:
            keys[search.target] = known_plan(search.plan, context).search().key if search.plan else search.key
    if errors:
        raise PuzzleError(f"{len(errors)} of {len(searches)} targets have no search:\n" + "\n".join(errors))
    return keys


def missing_library(plan: Plan, context: RunContext) -> str:
    """What the store lacks of the library, as a sentence; empty where it has all scores."""
    works, stored_keys = [*plan.all_scores(), *plan.long_scores()], context.store().keys(ScoreWork.stage)
    missing = sum(work.key not in stored_keys for work in works)
    if not missing:
        return ""
    return (
        f"No library yet: {context.store().place} has {len(works) - missing} of {len(works)} scores of "
        f"{plan.spec.parent.path}; `build-library` with this specification makes the others"
    )


def find_searches(plan: Plan, context: RunContext, directory: Path) -> list[TargetSearch]:
    """Every target of a directory and of the store with its search, if the store has it.

    Args:
        plan: the plan of a run specification; its target is replaced by each, and its scenario if the target has one.
        context: the context of that specification.
        directory: holds the target files.

    Raises:
        PuzzleError: there are no targets, or two of one name.
    """
    store = context.store()
    requests: dict[str, Callable[[], StoredTarget]] = {
        file.name: partial(_of_file, file) for file in sorted(directory.glob("*.yaml"))
    }
    requests |= {
        f"{path} of the store": partial(parsed, data, path) for path, data in store.documents(STORED_TARGETS).items()
    }
    if not requests:
        raise PuzzleError(
            f"{directory} holds no target files (*.yaml), and {store.place} no targets: name another directory, or add "
            "a target with the flow add-target"
        )
    searches = [_target_search(plan, context, where, read) for where, read in requests.items()]
    places: dict[str, str] = {}
    for search in searches:
        if other := places.get(search.target):
            raise PuzzleError(
                f"{other} and {search.file} have targets called {search.target!r}: give every target its own name"
            )
        places[search.target] = search.file
    return searches


def _of_file(file: Path) -> StoredTarget:
    return StoredTarget(target=load_target(file))


def _target_search(plan: Plan, context: RunContext, where: str, read: Callable[[], StoredTarget]) -> TargetSearch:
    """The search of one target; an error in it does not end the search of the others."""
    try:
        request = read()
        changes: dict[str, object] = {"target": request.target}
        if request.scenario:
            changes |= {"scenario": request.scenario, "more_scenarios": ()}
        spec = plan.spec.model_copy(update=changes)
        target_plan = Plan(spec, for_target(plan.inputs, request.target))
        key = known_plan(target_plan, context).search().key
    except PuzzleError as error:
        return TargetSearch(where, where.partition(" ")[0], None, "", None, str(error))
    store = context.store()
    record = store.record(SearchRecord, key) if store.has(key) else None
    return TargetSearch(where, request.name, target_plan, key, record, "")
