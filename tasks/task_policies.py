"""How the tasks of this package run: what shows them as cached, their retries, and what they hold while they run."""

import contextlib
import errno
import functools
import inspect
from collections.abc import Callable, Container, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

import torch
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import exponential_backoff

from puzzle_core.device import on_first
from puzzle_core.errors import LostProcessError, MeasurementError
from tasks.runtime.context import RunContext
from tasks.runtime.locks import gpu_lock, shared_gpu
from tasks.store.cache import pin_entries

RETRIES = 3
PASSING = frozenset(
    {
        errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.ENOTCONN,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
        errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.EREMOTEIO,
    }
)  # fmt: skip
"""What the system says of lost connections, of files in use, and of a network file system that fails for a while."""
IDLE_BYTES = 2**30
_listed: ContextVar[Container[str]] = ContextVar("listed", default=())
P = ParamSpec("P")
T = TypeVar("T")


def stage_task(
    name: str, task_run_name: str, *, cached: bool = True, tags: Iterable[str] = ()
) -> Callable[[Callable[P, T]], Task[P, T]]:
    """Decorate a function as a Prefect task that is retried where a retry can help.

    Args:
        name: of the task, in Prefect's UI.
        task_run_name: of its runs; may hold parameters in braces.
        cached: whether the function makes the artifact of its parameter `work`; where the store has that, the function
            is not called, and Prefect shows the run as Cached.
        tags: Prefect's tags, for concurrency limits.
    """

    def decorate(act: Callable[P, T]) -> Task[P, T]:
        return task(
            name=name,
            task_run_name=task_run_name,
            tags=tags,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=RETRIES,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_is_retryable,
        )(_unless_stored(act) if cached else act)

    return decorate


@contextlib.contextmanager
def listed(keys: Container[str]) -> Iterator[None]:
    """Let tasks that are called meanwhile take these keys for stored, as a listing said, without a request for each."""
    token = _listed.set(keys)
    try:
        yield
    finally:
        _listed.reset(token)


def is_listed(key: str) -> bool:
    """Whether this is one of the keys of `listed`; Dask gets this function by its name, and no context variable."""
    return key in _listed.get()


def _unless_stored(act: Callable[P, T]) -> Callable[P, T]:
    """Decorate a task's function: where the store has the artifact of its `work`, its state is Cached."""
    parameters = inspect.signature(act)

    @functools.wraps(act)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        arguments = parameters.bind(*args, **kwargs).arguments
        context, key = arguments["context"], arguments["work"].key
        if is_listed(key) or context.store().has(key):
            return cast(T, Completed(name="Cached", data=key))  # Prefect takes a state as the end of the task run
        return act(*args, **kwargs)

    return run


def with_pinned_inputs(act: Callable[P, T]) -> Callable[P, T]:
    """Decorate a task's function so that fetched artifacts stay in the local cache until it returns."""

    @functools.wraps(act)  # `pin_entries()` itself as the decorator could not be pickled for Dask
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with pin_entries():
            return act(*args, **kwargs)

    return run


def with_gpu(act: Callable[P, T]) -> Callable[P, T]:
    """As `with_pinned_inputs`, and hold the lock of one GPU and compute on it, where the machine has one."""

    @functools.wraps(act)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with pin_entries(), gpu_lock() as numbers, on_first(numbers):
            return act(*args, **kwargs)

    return run


def with_shared_gpu(act: Callable[P, T]) -> Callable[P, T]:
    """As `with_gpu`, for tasks that go side by side: those of one process share the GPUs of `context.workers` tasks."""
    parameters = inspect.signature(act)

    @functools.wraps(act)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        context: RunContext = parameters.bind(*args, **kwargs).arguments["context"]
        with pin_entries(), shared_gpu(context.workers) as numbers, on_first(numbers):
            return act(*args, **kwargs)

    return run


# `State[Any]`: Prefect passes the state of a task of any result.
def _is_retryable(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry lost connections and processes, noisy measurements and memory that others held, and nothing else."""
    try:
        state.result()
    except Exception as error:
        return can_pass(error)
    return False


def can_pass(error: BaseException) -> bool:
    """Whether the same work may succeed when it is done again.

    A missing file, a denied one, a full disk, a timeout of the task, bad input and bad numbers stay what they are. An
    `OSError` counts by its errno; one without an errno counts by its class. A GPU without memory counts where other
    processes hold some of it. NCCL's errors come from GKD's processes, as a `LostProcessError`.
    """
    if isinstance(error, TaskRunTimeoutError):
        return False
    if isinstance(error, OSError):
        return error.errno in PASSING if error.errno is not None else isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, torch.OutOfMemoryError):
        return _others_hold_memory()
    return isinstance(error, MeasurementError | LostProcessError)


def _others_hold_memory() -> bool:
    """Whether processes other than this one hold memory of a GPU, beyond what an idle process takes."""
    for device in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        if total_bytes - free_bytes - torch.cuda.memory_reserved(device) > IDLE_BYTES:
            return True
    return False
