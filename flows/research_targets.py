"""Re-search: an architecture for every hardware target that has none yet for the current library and scenario."""

import logging
from pathlib import Path
from typing import NamedTuple

from prefect import flow

from flows.permissions import permitted
from flows.search_architecture import known_plan, search_planned_architecture
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import plan_run
from puzzle_core.errors import PuzzleError
from puzzle_core.plan import Plan
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import RunSpec
from puzzle_core.target import load_target
from tasks.runtime.context import RunContext
from tasks.stage_tasks import for_target

log = logging.getLogger("puzzle")
TARGETS = "deployments/targets"


class TargetSearch(NamedTuple):
    """One target file: the plan for it with its search, and that search's record if the store has it.

    A file with an error has no plan, and the error's text.
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
    """Search every target without a search for its file, the parent's library and the scenario as they are now.

    Args:
        spec: The run specification; its target is not used. The library of its parent must be in the store.
        targets: Directory of target files.

    Returns:
        The key of every target's search, by the target's name.

    Raises:
        PuzzleError: names every target that failed, once all others are done.
    """
    spec = permitted(spec)
    plan, context = plan_run(spec)
    searches = find_searches(plan, context, Path(targets))
    keys, errors = {}, []
    for search in searches:
        error = search.error
        if search.record is None and search.plan is not None:
            try:
                search_planned_architecture(search.plan, context)
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


def find_searches(plan: Plan, context: RunContext, directory: Path) -> list[TargetSearch]:
    """Every target file of a directory with its search, if the store has it.

    Args:
        plan: the plan of a run specification; its target is replaced by that of each file.
        context: the context of that specification.
        directory: holds the target files.

    Raises:
        PuzzleError: there are no target files, or two of one name.
    """
    files = sorted(directory.glob("*.yaml"))
    if not files:
        raise PuzzleError(f"{directory} holds no target files (*.yaml): name another directory")
    searches = [_target_search(plan, context, file) for file in files]
    names = [search.target for search in searches]
    for name in names:
        if names.count(name) > 1:
            raise PuzzleError(f"two files of {directory} have targets called {name!r}: give every target its own name")
    return searches


def _target_search(plan: Plan, context: RunContext, file: Path) -> TargetSearch:
    """The search of one file; an error in the file does not end the search of the others."""
    try:
        target = load_target(file)
        target_plan = Plan(plan.spec.model_copy(update={"target": target}), for_target(plan.inputs, target))
        key = known_plan(target_plan, context).search().key
    except PuzzleError as error:
        return TargetSearch(file.name, file.stem, None, "", None, str(error))
    store = context.store()
    record = store.record(SearchRecord, key) if store.has(key) else None
    return TargetSearch(file.name, target.name, target_plan, key, record, "")
