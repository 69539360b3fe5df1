"""How the tasks of this package run: their cache key, their retries, and what they hold while they run."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import exponential_backoff

from puzzle_core.device import on_first
from puzzle_core.errors import LostProcessError, MeasurementError
from puzzle_core.records import Work
from tasks.runtime.locks import gpu_lock
from tasks.store.cache import pin_entries

RETRIES = 3
P = ParamSpec("P")
T = TypeVar("T")


def cache_key(work: Work) -> str:
    """The key of Prefect's cache for the task of this work."""
    return work.key.replace("/", "-")


def stage_task(
    name: str, task_run_name: str, *, cached: bool = True, tags: Iterable[str] = ()
) -> Callable[[Callable[P, T]], Task[P, T]]:
    """Decorate a function as a Prefect task that is retried where a retry can help.

    Args:
        name: of the task, in Prefect's UI.
        task_run_name: of its runs; may hold parameters in braces.
        cached: whether the function has a parameter `work`, whose key is the cache key; else it runs every time.
        tags: Prefect's tags, for concurrency limits.
    """
    return task(
        name=name,
        task_run_name=task_run_name,
        tags=tags,
        cache_policy=_BY_WORK if cached else NO_CACHE,
        persist_result=cached,
        result_serializer="json",
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(backoff_factor=2),
        retry_jitter_factor=0.5,
        retry_condition_fn=_is_retryable,
    )


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


# `State[Any]`: Prefect passes the state of a task of any result.
def _is_retryable(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry errors of the storage, lost processes and noisy measurements; not timeouts, bad input or bad numbers."""
    try:
        state.result()
    except TaskRunTimeoutError:
        return False
    except (MeasurementError, LostProcessError, OSError):
        return True
    except Exception:
        return False
    return False


def _key_of_parameters(_context: object, parameters: dict[str, Any]) -> str:
    return cache_key(parameters["work"])


_BY_WORK = CacheKeyFnPolicy(cache_key_fn=_key_of_parameters)
