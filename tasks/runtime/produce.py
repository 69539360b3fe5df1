"""Making one artifact: lock it, compute it in a staging directory, publish it, and drop its checkpoint.

A lock of this machine (locks.py) and, for a store in a bucket, a lease among machines (lease.py) leave it to one run.
"""

import contextlib
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from prefect.runtime import flow_run, task_run

from puzzle_core.device import default_device, device_name
from puzzle_core.records import Record, Work
from tasks.runtime.budget import Meter, metered
from tasks.runtime.context import RunContext
from tasks.runtime.lease import lease
from tasks.runtime.locks import LockMode, artifact_lock, machine_lock
from tasks.runtime.named_inputs import check_parent
from tasks.runtime.software import software
from tasks.store.origin import Origin, Usage


def produce(
    work: Work,
    context: RunContext,
    compute: Callable[[Path], Record],
    lock: LockMode | None = "shared",
    devices: int | None = None,
) -> str:
    """Make the artifact of `work` unless the store has it, and remove the checkpoint of `work` in both cases.

    The parent is compared with what `work` names before the computation and after it, since weights are read lazily.

    Args:
        work: what the stage is asked.
        context: where the artifact goes.
        compute: writes the artifact's files into the given directory and returns its record.
        lock: how the machine is locked meanwhile: "exclusive" for a measurement, none where nothing is computed that
            could disturb one.
        devices: how many GPUs or cores compute; by default the GPU of the task, or the threads of its products.

    Returns:
        The artifact's key.

    Raises:
        ParentError: the parent is not the one that `work` names, or changed meanwhile; nothing is stored.
        BudgetError: the run's budget is used up; a training has left its checkpoint.
    """
    store = context.store()
    with contextlib.ExitStack() as locks:
        locks.enter_context(artifact_lock(f"{work.key} for {store.place}"))
        if store.bucket and not store.has(work.key):
            locks.enter_context(lease(store.bucket, work.key))
        if not store.has(work.key):
            check_parent(work, context)
            with store.staging() as staged:
                with machine_lock(lock) if lock else contextlib.nullcontext(), _metered(context, devices) as meter:
                    record = compute(staged)
                    usage = _usage(meter)
                check_parent(work, context)
                origin = _origin(context).model_copy(update={"usage": usage})
                store.publish(work, record, staged, made_by=flow_run.get_name() or "a script", origin=origin)
    shutil.rmtree(context.checkpoints(work).file.parent, ignore_errors=True)
    return work.key


def _metered(context: RunContext, devices: int | None) -> contextlib.AbstractContextManager[Meter]:
    """The meter of a computation by so many devices; by default the GPU of the task, or the threads of its products."""
    count = devices or (1 if default_device().type == "cuda" else torch.get_num_threads())
    return metered(count, context.account, context.runtime.budget)


def _usage(meter: Meter) -> Usage:
    device_seconds = meter.device_seconds  # read first, so that it is no more than all seconds of all devices
    return Usage(
        seconds=meter.seconds,
        kind="GPU" if default_device().type == "cuda" else "core",
        devices=meter.devices,
        device_seconds=device_seconds,
    )


def _origin(context: RunContext) -> Origin:
    """What makes an artifact in the present task."""
    return Origin(
        software=software(),
        host=platform.node(),
        device=device_name(default_device()),
        parent=context.parent.path,
        parent_commit=context.parent_commit,
        prefect_flow_run=flow_run.get_id(),
        prefect_task_run=task_run.get_id(),
        mlflow_run=context.mlflow_run,
    )
