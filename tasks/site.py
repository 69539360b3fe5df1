"""Where a run happens: the places tasks read from and write to. Enters no key.

Opened things (the parent, the store, captured activations) are kept per process, since all tasks of a worker share it.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from prefect.runtime import flow_run

from puzzle_core.data import read_windows
from puzzle_core.device import available_cores, default_device
from puzzle_core.distill.loop import Checkpoints
from puzzle_core.errors import StorageError
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.records import Record, Work, write_text_atomic
from puzzle_core.spec import Dtype, ParentSpec, RunSpec, RuntimeSpec
from tasks.store import Store


class Site(Record):
    """The parent and the places of one run."""

    parent: ParentSpec
    runtime: RuntimeSpec

    @classmethod
    def of(cls, spec: RunSpec) -> "Site":
        """The site of a run specification."""
        return cls(parent=spec.parent, runtime=spec.runtime)

    @property
    def scratch(self) -> Path:
        """Local directory for what is no artifact."""
        return Path(self.runtime.scratch)

    @property
    def workers(self) -> int:
        """How many tasks run side by side: one per GPU, or one per core."""
        return self.runtime.workers or (torch.cuda.device_count() or available_cores())

    @property
    def threads_per_task(self) -> int:
        """CPU threads of one task, so that all workers together take the cores once."""
        return max(1, available_cores() // self.workers)

    def store(self) -> Store:
        """The artifact store."""
        return _open_store(self.runtime.store, self.scratch / "store-cache")

    def open_parent(self) -> Parent:
        """The parent, opened once per process."""
        return _open_parent(self.parent)

    def activations(self, tokens: str, dtype: Dtype) -> Activations:
        """The captured states of a split of tokens."""
        name = hashlib.sha256(f"{tokens} {dtype} {self.parent_digest()}".encode()).hexdigest()[:16]
        windows = read_windows(self.store().fetch(tokens))
        return Activations(
            self.scratch / "activations" / name, self.open_parent(), windows, torch_dtype(dtype), default_device()
        )

    def checkpoints(self, work: Work) -> Checkpoints:
        """Where a training in progress keeps its checkpoint."""
        file = self.scratch / "checkpoints" / f"{work.key.replace('/', '-')}.safetensors"
        return Checkpoints(file, self.runtime.checkpoint_seconds)

    def produce(self, work: Work, compute: Callable[[Path], Record]) -> str:
        """Make the artifact of `work` unless the store has it; its checkpoint, if any, is dropped afterwards.

        Returns:
            The artifact's key.
        """
        store = self.store()
        if not store.has(work.key):
            with store.staging() as staged:
                store.publish(work, compute(staged), staged, made_by=flow_run.get_name() or "a script")
            checkpoint = self.checkpoints(work).file
            for file in checkpoint.parent.glob(f"*{checkpoint.name}*"):  # and what a killed process left of one
                file.unlink(missing_ok=True)
        return work.key

    def check_room(self, scratch_bytes: int, store_bytes: int) -> None:
        """Refuse a run that the disks cannot hold; a remote store is not asked.

        Raises:
            StorageError: says how much is needed, how much is free, and where.
        """
        places = {"runtime.scratch": (self.scratch, scratch_bytes)}
        if self.store().is_local:
            places["runtime.store"] = (Path(self.runtime.store), store_bytes)
        for key, (place, needed) in places.items():
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make the directory {place} ({error.strerror}): set {key}") from error
            free = shutil.disk_usage(place).free
            if needed > free:
                raise StorageError(
                    f"{place} has {free / 2**20:,.0f} MiB free, and this run needs up to {needed / 2**20:,.0f} MiB "
                    f"there: free some space, or set {key} to a larger disk"
                )

    def parent_digest(self) -> str:
        """Digest of the parent, after a look at every weight; remembered as long as its files do not change.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        parent = self.open_parent()
        files = [parent.directory / "config.json", *parent.checkpoint.files]
        signature = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        name = hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:16]
        known = self.scratch / "parents" / f"{name}.digest"
        if not known.exists():
            parent.check_finite()
            write_text_atomic(known, parent.digest)
        return known.read_text()


@functools.lru_cache(maxsize=1)
def _open_parent(spec: ParentSpec) -> Parent:
    return Parent(spec)


@functools.lru_cache(maxsize=4)
def _open_store(url: str, cache: Path) -> Store:
    return Store(url, cache)
