"""The graph of a run in Prefect: a task's edges come from the keys that its work names.

Flows submit a task when all that it reads is there, so no task waits: Prefect's `wait_for` only says what came from
where. The UI draws one flow run at a time. Seen from a flow, what a flow within it made comes from that flow's run.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from prefect import Flow, Task
from prefect.client.schemas.objects import State, StateDetails
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.utilities.annotations import quote
from prefect.utilities.engine import link_state_to_flow_run_result

P = ParamSpec("P")
T = TypeVar("T")
INPUTS = "inputs"
"""The name of what the task `open inputs` makes; the source of all that has no other."""
# `Any` below stands for results and parameters of tasks of every signature, which only pass through.


class _Producer(NamedTuple):
    """A task run, or its future, and the flow runs that it lies in, the outermost first."""

    run: State[Any] | PrefectFuture[Any]
    flow_runs: tuple[UUID, ...]


class _FlowRunMark:
    """Stands for a flow run in `wait_for`: Prefect knows it as the flow run's result."""


_producers: ContextVar[dict[str, _Producer] | None] = ContextVar("producers", default=None)
_enclosing: ContextVar[tuple[UUID, ...]] = ContextVar("enclosing", default=())


def start_graph() -> None:
    """Forget what other runs of this process made."""
    _producers.set({})


def call_task(task: Task[..., T], makes: str, after: Iterable[str] = (), **arguments: Any) -> T:
    """Run a task in this thread, and note it as what made the artifact or step of the name `makes`.

    Args:
        task: the task.
        makes: the key of its artifact, or another name.
        after: the names that it comes after.
        **arguments: of the task.
    """
    state: State[T] = task(**_quoted(arguments), wait_for=_upstream(after), return_state=True)  # type: ignore[call-overload]
    _note(makes, state)
    result: T = state.result()
    return result


def submit_task(task: Task[..., T], makes: str, after: Iterable[str] = (), **arguments: Any) -> PrefectFuture[T]:
    """As `call_task`, in the flow's task runner."""
    future: PrefectFuture[T] = task.submit(**_quoted(arguments), wait_for=_upstream(after))  # type: ignore[call-overload]
    _note(makes, future)
    return future


def call_flow(flow: Flow[..., T], *arguments: Any, after: Iterable[str] = (), **named: Any) -> T:
    """Run a flow within the present one.

    Args:
        flow: the flow.
        *arguments: of the flow.
        after: the names that it comes after.
        **named: arguments of the flow by name.
    """
    around = _present_flow_runs()
    upstream = _upstream(after)
    token = _enclosing.set(around)
    try:
        result: T = flow(*map(quote, arguments), **_quoted(named), wait_for=upstream)  # type: ignore[call-overload]
        return result
    finally:
        _enclosing.reset(token)


def _quoted(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that Prefect does not search for results of other tasks, which it would know by their addresses."""
    return {name: quote(value) for name, value in arguments.items()}


def _note(name: str, run: State[Any] | PrefectFuture[Any]) -> None:
    if (producers := _producers.get()) is not None:
        producers[name] = _Producer(run, _present_flow_runs())


def _upstream(names: Iterable[str]) -> list[Any]:
    """The runs that made what has these names, as `wait_for` takes them: one entry for each run."""
    producers, here = _producers.get() or {}, _present_flow_runs()[-1:]
    found = [producers[name] for name in dict.fromkeys(names) if name in producers]
    if not found and INPUTS in producers:
        found = [producers[INPUTS]]
    task_runs: list[State[Any]] = []
    within = dict[UUID, _FlowRunMark]()
    for run, flow_runs in found:
        if here and here[0] in flow_runs[:-1]:
            flow_run = flow_runs[flow_runs.index(here[0]) + 1]
            within.setdefault(flow_run, _mark(flow_run))
        else:
            task_runs.append(run.state if isinstance(run, PrefectFuture) else run)
    return [*task_runs, *within.values()]


def _mark(flow_run: UUID) -> _FlowRunMark:
    mark, details = _FlowRunMark(), StateDetails(flow_run_id=flow_run)
    link_state_to_flow_run_result(Completed(state_details=details), mark)
    return mark


def _present_flow_runs() -> tuple[UUID, ...]:
    """The ids of the present flow run and those around it, the outermost first; none outside of flows."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return ()
    return (*_enclosing.get(), context.flow_run.id)
