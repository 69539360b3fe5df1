"""The places and resources of one run: parent, artifact store, scratch directory, workers. No part of any key.

A process opens a parent (opened_parent.py) and a store once, since all tasks of a worker share them.
"""

import contextlib
import functools
import hashlib
import shutil
import uuid
from glob import glob
from pathlib import Path

import torch

from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.data import read_positions, read_windows
from puzzle_core.device import available_cores, default_device
from puzzle_core.distill.launch import Launch
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.errors import ParentError
from puzzle_core.installed_file import local_path
from puzzle_core.model.activations import Activations, ChildActivations
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.model.surgery import load_weights
from puzzle_core.records import Record, Work
from puzzle_core.spec import ParentSpec, RunSpec, RuntimeSpec
from puzzle_core.state_dict import State
from puzzle_core.target import ComputeDtype
from puzzle_core.work import AssembleWork
from tasks.runtime.budget import over_budget
from tasks.runtime.digest_cache import parent_digest
from tasks.runtime.locks import artifact_lock
from tasks.runtime.opened_parent import open_parent
from tasks.store.store import Store


class RunContext(Record):
    """The parent and the runtime settings of one run, with what tasks open by them.

    `parent_commit` is the hub's commit that the parent was fetched at, `mlflow_run` the id of the run in MLflow. In a
    later round of iterated Puzzle `child` is the key of the child that is the parent, and `parent` is the first one.
    """

    parent: ParentSpec
    child: str | None = None
    runtime: RuntimeSpec
    parent_commit: str | None = None
    mlflow_run: str | None = None
    account: str | None = None

    @classmethod
    def of(cls, spec: RunSpec) -> "RunContext":
        """The context of a run specification."""
        return cls(parent=spec.parent, runtime=spec.runtime, account=uuid.uuid4().hex if spec.runtime.budget else None)

    def at_commit(self, commit: str | None) -> "RunContext":
        """The same context, whose tasks on all machines open a hub's parent at this commit."""
        if commit is None:
            return self
        parent = self.parent.model_copy(update={"revision": commit})
        return self.model_copy(update={"parent": parent, "parent_commit": commit})

    @property
    def of_first(self) -> "RunContext":
        """The context of tasks that read the first parent, in every round."""
        return self.model_copy(update={"child": None})

    @property
    def scratch(self) -> Path:
        """Local directory for files that are no artifacts."""
        return Path(self.runtime.scratch)

    @property
    def workers(self) -> int:
        """How many tasks run side by side: one per GPU, or one per core."""
        return self.runtime.workers or (torch.cuda.device_count() or available_cores())

    @property
    def threads_per_task(self) -> int:
        """CPU threads of one task; all workers together use each core once."""
        return max(1, available_cores() // self.workers)

    @property
    def devices(self) -> int:
        """How many devices the tasks of this machine compute on: its GPUs, or the CPU."""
        return max(1, torch.cuda.device_count())

    @property
    def compute_slot(self) -> ComputeSlot:
        """A compute slot on the device of the current task: a GPU computes for one task at a time."""
        device = default_device()
        return ComputeSlot(str(device), 1 if device.type == "cuda" else self.workers)

    @property
    def launch(self) -> Launch | None:
        """How several processes share GKD; none where a single process does it."""
        runtime = self.runtime
        if runtime.gkd_processes * runtime.gkd_machines == 1:
            return None
        return Launch(processes=runtime.gkd_processes, machines=runtime.gkd_machines, rendezvous=runtime.gkd_rendezvous)

    def store(self) -> Store:
        """The artifact store, opened once per process."""
        return _open_store(self.runtime)

    def open_parent(self) -> Parent:
        """The parent as its files are now, opened once per process until they change."""
        if self.child is None:
            return open_parent(self.parent, self.scratch)
        place = {"path": str(self.store().fetch(self.child)), "revision": None}
        return open_parent(self.parent.model_copy(update=place), self.scratch)

    @property
    def readable_parent(self) -> ParentSpec:
        """The parent as another process opens it: the directory that a GGUF file was imported into."""
        if not local_path(self.parent.path).is_file():
            return self.parent
        return self.parent.model_copy(update={"path": str(self.open_parent().directory)})

    def parent_of(self, digest: str) -> Parent:
        """The parent, where it is the one of this digest.

        Raises:
            ParentError: it is another one.
        """
        parent = self.open_parent()
        actual = self.child or parent_digest(parent, self.scratch)
        if actual != digest:
            raise ParentError(
                f"the parent {self.parent.path} is not the one of this run: its digest was {digest} when the run "
                f"started, and is {actual} here: its files changed since, or are others on this machine; start the run "
                "again, which gives the new weights keys of their own"
            )
        return parent

    def activations(
        self, digest: str, tokens: str, dtype: ComputeDtype, base: AssembleWork | None = None
    ) -> Activations:
        """The captured activations of one split of tokens.

        Args:
            digest: of the parent.
            tokens: key of the tokens artifact.
            dtype: what they are computed and stored in.
            base: the child that they are captured from; the parent where it is none.

        Raises:
            ParentError: the parent is another one.
        """
        parent, windows = self.parent_of(digest), self.store().fetch(tokens)
        directory = self.activations_directory(digest, tokens, dtype)
        of_parent = Activations(
            directory, parent, read_windows(windows), torch_dtype(dtype), default_device(), read_positions(windows)
        )
        if base is None:
            return of_parent
        library = base.library

        def weights(layer: int) -> dict[str, State]:
            return {name: load_weights(self.store().fetch(key)) for name, key in library[layer]}

        directory = self.activations_directory(digest, tokens, dtype, base)
        return ChildActivations(directory, of_parent, base.architecture, weights)

    def activations_directory(
        self, parent: str, tokens: str, dtype: ComputeDtype, base: AssembleWork | None = None
    ) -> Path:
        """The directory of `activations`, from the parent's digest: opens neither the parent nor the store."""
        name = hashlib.sha256(f"{tokens} {dtype} {parent}".encode()).hexdigest()[:16]
        return self.scratch / "activations" / (f"{name}-{base.digest()[:16]}" if base else name)

    def lock_activations(self, tokens: str, dtype: ComputeDtype) -> contextlib.AbstractContextManager[None]:
        """Lock these activations against other runs on this machine: they capture, use and drop the same files."""
        return artifact_lock(f"states of {tokens} in {dtype} below {self.scratch.resolve()}")

    def checkpoints(self, work: Work) -> Checkpoints:
        """Where a training keeps its checkpoint: a directory per work, which also holds a half-written checkpoint."""
        file = self.scratch / "checkpoints" / work.key / "checkpoint.safetensors"
        return Checkpoints(file, self.runtime.checkpoint_seconds, over_budget if self.account else None)

    def drop_finished_checkpoints(self) -> None:
        """Remove checkpoints whose artifact is in the store: a process was killed after it had published."""
        store, checkpoints = self.store(), self.scratch / "checkpoints"
        for key in glob("*/*/*", root_dir=checkpoints):  # not Path.glob, which fails where another run removes one
            if store.has(Path(key).as_posix()):
                shutil.rmtree(checkpoints / key, ignore_errors=True)


@functools.lru_cache(maxsize=4)
def _open_store(runtime: RuntimeSpec) -> Store:
    return Store.of(runtime)
