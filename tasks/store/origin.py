"""What made an artifact: software, machine, and the ids of its runs. It lies beside the key, and changes none."""

from typing import Literal

from puzzle_core.records import Record


class Software(Record):
    """The software of a process.

    `code` is the digest of the project's source files as they were when this process started, `lock` that of
    constraints.txt. `commit` is that of the project's own git checkout, and `dirty` whether the checkout had changes;
    both are none of an installed package.
    """

    code: str
    commit: str | None = None
    dirty: bool | None = None
    lock: str | None = None
    versions: dict[str, str]


class Usage(Record):
    """What an artifact took: seconds from the start of its computation to its end, and device-seconds of computing.

    A task that takes turns with others computes for a part of these seconds. `devices` are the CPU cores or GPUs that
    computed meanwhile, and `device_seconds` is their number times the seconds in which they did.
    """

    seconds: float
    kind: Literal["core", "GPU"]
    devices: int
    device_seconds: float


class Origin(Record):
    """What made an artifact.

    Older manifests lack `usage`. `parent` is the parent as the specification names it, and `parent_commit` the hub's
    commit that it was fetched at.
    """

    software: Software
    host: str
    device: str
    parent: str
    parent_commit: str | None = None
    prefect_flow_run: str | None = None
    prefect_task_run: str | None = None
    mlflow_run: str | None = None
    usage: Usage | None = None
