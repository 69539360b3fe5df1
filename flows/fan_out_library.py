"""The block library by several machines: ranges of layers as runs of a deployment, over one store.

Whoever takes a range needs the parent, the texts and the store, and no other place in common with the others: it
captures the states of the layers before its own by itself. What two ranges both need (tokens, channel contributions)
is made once (tasks/runtime/lease.py).
"""

import logging
import time
from typing import Annotated, Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from pydantic import Field

from flows.build_library import announce_library, build_planned_library
from flows.permissions import permitted
from flows.run_graph import call_flow
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import plan_run
from puzzle_core.errors import PuzzleError, SpecError
from puzzle_core.plan import Plan, layer_ranges
from puzzle_core.spec import RunSpec
from puzzle_core.work import BldWork, ScoreWork
from tasks.runtime.context import RunContext

log = logging.getLogger("puzzle")
BUILD_LAYERS = "build-library/build-layers"
ATTEMPTS = 3
"""Of a range whose machine is lost."""
POLL_SECONDS = 2.0


@flow(
    name="fan-out-library",
    flow_run_name="library of {spec.name} in {ranges} ranges",
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def fan_out_library(spec: RunSpec, ranges: Annotated[int, Field(ge=1)] = 2, deployment: str = BUILD_LAYERS) -> None:
    """Build the block library in ranges of layers, each a run that any worker may take, and wait for them.

    Args:
        spec: The run specification; its store must be one place for all machines.
        ranges: Number of ranges of layers, for instance the number of machines.
        deployment: The deployment of `build-library` that the ranges are runs of.

    Raises:
        PuzzleError: ranges failed, once all others have ended; or the store lacks what they made.
        SpecError: the server does not have the deployment.
    """
    plan, context = plan_run(permitted(spec))
    parts = layer_ranges(len(plan.layers), ranges)
    build_ranges(spec, parts, deployment)
    _check_whole(plan, context, parts)
    call_flow(build_planned_library, plan, context)  # makes options that span two ranges, and records the library
    announce_library(plan)


def build_ranges(spec: RunSpec, parts: list[str], deployment: str) -> None:
    """Run the deployment once for each range, and wait. A range whose process or machine is lost is run again.

    If this stops early, the runs are cancelled.

    Raises:
        PuzzleError: names every range that failed, once all others have ended.
        SpecError: the server does not have the deployment.
    """
    content = _share(spec, len(parts)).model_dump(mode="json", exclude_unset=True)
    attempts, failed, running = dict.fromkeys(parts, 0), [], dict[str, UUID]()
    with get_client(sync_client=True) as client:
        try:
            for part in parts:
                running[part] = _start(content, part, deployment)
            while running:
                time.sleep(POLL_SECONDS)
                for part, state in _ended(client, running).items():
                    del running[part]
                    attempts[part] += 1
                    if state.is_crashed() and attempts[part] < ATTEMPTS:
                        log.warning("layers %s: %s; the range starts again", part, state.message)
                        running[part] = _start(content, part, deployment)
                    elif state.is_completed():
                        log.info("layers %s: done, %d of %d ranges are left", part, len(running), len(parts))
                    else:
                        failed.append(f"layers {part}: {state.name}: {state.message}")
        except BaseException:
            _cancel(client, running)
            raise
    if failed:
        raise PuzzleError(f"{len(failed)} of {len(parts)} ranges failed:\n" + "\n".join(failed))


def _share(spec: RunSpec, parts: int) -> RunSpec:
    """The specification with one part's share of the budget, since every run keeps an account of its own."""
    if not (budget := spec.runtime.budget):
        return spec
    share = budget.model_copy(update={"hours": budget.hours / parts})
    return spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"budget": share})})


def _start(content: dict[str, object], part: str, deployment: str) -> UUID:
    try:
        run = run_deployment(deployment, parameters={"spec": content, "layers": part}, timeout=0)
    except ObjectNotFound as error:
        raise SpecError(
            f"the Prefect server has no deployment {deployment}: `prefect deploy --all` registers those of prefect.yaml"
        ) from error
    return run.id  # type: ignore[union-attr]  # a coroutine only in an event loop


def _ended(client: SyncPrefectClient, running: dict[str, UUID]) -> dict[str, State[Any]]:
    states = {part: client.read_flow_run(run).state for part, run in running.items()}
    return {part: state for part, state in states.items() if state and state.is_final()}


def _cancel(client: SyncPrefectClient, running: dict[str, UUID]) -> None:
    for run in running.values():
        state = client.read_flow_run(run).state
        if state and not state.is_final():
            cancelled: State[None] = State(
                type=StateType.CANCELLING if state.is_running() else StateType.CANCELLED,
                message="The run that started this range has stopped.",
            )
            client.set_flow_run_state(run, cancelled)


def _check_whole(plan: Plan, context: RunContext, parts: list[str]) -> None:
    """Check that the ranges left everything in the store of this process.

    Raises:
        PuzzleError: they did not.
    """
    store = context.store()
    stored = store.keys(BldWork.stage) | store.keys(ScoreWork.stage)
    ranges = [plan.of_layers(part) for part in parts]
    works = [work for each in ranges for work in (*each.all_bld(), *each.all_scores(), *each.long_scores())]
    missing = [work.key for work in works if work.key not in stored]
    if missing:
        raise PuzzleError(
            f"{len(parts)} ranges have ended well, but {len(missing)} of their artifacts are not in {store.place}, the "
            f"first being {missing[0]}: runtime.store must be one place for all machines, such as s3://bucket/prefix, "
            "and parent, texts and `auto` types must be the same on all of them"
        )
