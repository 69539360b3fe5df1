"""Re-search: an architecture for every hardware target that has none yet for the current library and scenario."""

import logging
from pathlib import Path
from typing import NamedTuple

from prefect import flow

from flows.search_architecture import search_architecture
from flows.services.orphaned_runs import label_process
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


class Answer(NamedTuple):
    """What is known of one target file: its search's key, and the answer if there is one, or what is wrong with it."""

    file: str
    target: str
    spec: RunSpec | None
    key: str
    record: SearchRecord | None
    trouble: str


@flow(
    name="research-targets",
    flow_run_name="targets of {spec.name}",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
def research_targets(spec: RunSpec, targets: str = TARGETS) -> dict[str, str]:
    """Search every target that has no answer, or whose file, library or scenario changed since it was answered.

    Args:
        spec: The run specification; its own target is not used. The library of its parent must be in the store.
        targets: Directory of target files.

    Returns:
        The key of every target's search, by the target's name.

    Raises:
        PuzzleError: names every target that failed, once all others are done.
    """
    context = RunContext.of(spec)
    answers = find_answers(spec, plan_run(spec, context), context, Path(targets))
    found, failed = {}, []
    for answer in answers:
        if answer.record is None and answer.spec is not None:
            try:
                search_architecture(answer.spec)
            except PuzzleError as error:
                answer = answer._replace(trouble=str(error))
        else:
            log.info("target %s: %s", answer.target, answer.trouble or f"answered before ({answer.key})")
        if answer.trouble:
            failed.append(f"{answer.file}: {answer.trouble}")
        else:
            found[answer.target] = answer.key
    if failed:
        raise PuzzleError(f"{len(failed)} of {len(answers)} targets have no answer:\n" + "\n".join(failed))
    return found


def find_answers(spec: RunSpec, plan: Plan, context: RunContext, directory: Path) -> list[Answer]:
    """Every target file of a directory with the answer that the store has for it.

    Raises:
        PuzzleError: there are no target files, or two of one name.
    """
    files = sorted(directory.glob("*.yaml"))
    if not files:
        raise PuzzleError(f"{directory} holds no target files (*.yaml): say where they are")
    answers = [_answer(spec, plan, context, file) for file in files]
    names = [answer.target for answer in answers]
    for name in names:
        if names.count(name) > 1:
            raise PuzzleError(f"two files of {directory} have targets called {name!r}: give every target its own name")
    return answers


def _answer(spec: RunSpec, plan: Plan, context: RunContext, file: Path) -> Answer:
    """One file; what is wrong with it stays its own trouble."""
    try:
        target = load_target(file)
        own = spec.model_copy(update={"target": target})
        key = Plan(own, for_target(plan.inputs, target)).search().key
    except PuzzleError as error:
        return Answer(file.name, file.stem, None, "", None, str(error))
    store = context.store()
    record = store.record(SearchRecord, key) if store.has(key) else None
    return Answer(file.name, target.name, own, key, record, "")
