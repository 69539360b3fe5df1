"""Where a run happens: the places tasks read from and write to. Enters no key.

Opened things (the parent, the store, captured activations) are kept per process, since all tasks of a worker share it.
"""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from prefect.runtime import flow_run

from puzzle_core.architecture import Variant
from puzzle_core.data import read_windows
from puzzle_core.device import available_cores, default_device
from puzzle_core.distill.launch import Launch
from puzzle_core.distill.loop import Checkpoints
from puzzle_core.errors import StorageError
from puzzle_core.model.activations import Activations, ChildActivations
from puzzle_core.model.parent import Parent, torch_dtype
from puzzle_core.model.surgery import State, load_weights
from puzzle_core.records import Record, Work, write_text_atomic
from puzzle_core.spec import Dtype, ParentSpec, RunSpec, RuntimeSpec
from puzzle_core.text_sources import digest_documents, read_documents, source_files
from puzzle_core.work import AssembleWork
from tasks.runtime.locks import artifact_lock, machine_lock
from tasks.store.store import Store


class RunContext(Record):
    """The parent and the places of one run."""

    parent: ParentSpec
    runtime: RuntimeSpec

    @classmethod
    def of(cls, spec: RunSpec) -> "RunContext":
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

    @property
    def launch(self) -> Launch | None:
        """How several processes share GKD; none where one does it."""
        runtime = self.runtime
        if runtime.gkd_processes * runtime.gkd_machines == 1:
            return None
        return Launch(processes=runtime.gkd_processes, machines=runtime.gkd_machines, rendezvous=runtime.gkd_rendezvous)

    def store(self) -> Store:
        """The artifact store."""
        return _open_store(self.runtime)

    def open_parent(self) -> Parent:
        """The parent, opened once per process."""
        return _open_parent(self.parent)

    def activations(self, tokens: str, dtype: Dtype, base: AssembleWork | None = None) -> Activations:
        """The captured states of a split of tokens under the parent, or under a child."""
        windows, digest = read_windows(self.store().fetch(tokens)), self.parent_digest()
        directory = self.activations_directory(digest, tokens, dtype)
        parents = Activations(directory, self.open_parent(), windows, torch_dtype(dtype), default_device())
        if base is None:
            return parents
        library = base.library

        def weights(layer: int) -> dict[Variant, State]:
            return {Variant.parse(variant): load_weights(self.store().fetch(key)) for variant, key in library[layer]}

        directory = self.activations_directory(digest, tokens, dtype, base)
        return ChildActivations(directory, parents, base.architecture, weights)

    def activations_directory(self, parent: str, tokens: str, dtype: Dtype, base: AssembleWork | None = None) -> Path:
        """The directory of `activations`, from the parent's digest: opens neither the parent nor the store."""
        name = hashlib.sha256(f"{tokens} {dtype} {parent}".encode()).hexdigest()[:16]
        return self.scratch / "activations" / (f"{name}-{base.digest()[:16]}" if base else name)

    def lock_activations(self, tokens: str, dtype: Dtype) -> contextlib.AbstractContextManager[None]:
        """Keep other runs on this machine from these states while they are captured, used and dropped."""
        return artifact_lock(f"states of {tokens} in {dtype} below {self.scratch.resolve()}")

    def checkpoints(self, work: Work) -> Checkpoints:
        """Where a training in progress keeps its checkpoint: a directory of its own, for what is half written too."""
        file = self.scratch / "checkpoints" / work.key / "checkpoint.safetensors"
        return Checkpoints(file, self.runtime.checkpoint_seconds)

    def drop_finished_checkpoints(self) -> None:
        """Drop what trainings left whose artifact is in the store: they were killed between the two."""
        store, places = self.store(), self.scratch / "checkpoints"
        for directory in places.glob("*/*/*"):
            if store.has(directory.relative_to(places).as_posix()):
                shutil.rmtree(directory, ignore_errors=True)

    def produce(self, work: Work, compute: Callable[[Path], Record], alone: bool | None = False) -> str:
        """Make the artifact of `work` unless the store has it; its checkpoint, if any, is dropped either way.

        Returns:
            The artifact's key.
        """
        store = self.store()
        with artifact_lock(f"{work.key} for {store.place}"):
            if not store.has(work.key):
                with store.staging() as staged:
                    with contextlib.nullcontext() if alone is None else machine_lock(alone):
                        record = compute(staged)
                    store.publish(work, record, staged, made_by=flow_run.get_name() or "a script")
        shutil.rmtree(self.checkpoints(work).file.parent, ignore_errors=True)
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

        def look() -> str:
            parent.check_finite()
            return parent.digest

        return self._remembered("parents", [parent.directory / "config.json", *parent.checkpoint.files], look)

    def texts_digest(self, sources: tuple[str, ...]) -> str:
        """Digest of the texts in these sources, in their order; remembered as long as their files do not change.

        Raises:
            DataError: as `read_documents`.
        """
        return self._remembered("texts", source_files(sources), lambda: digest_documents(read_documents(sources)))

    def _remembered(self, kind: str, files: list[Path], look: Callable[[], str]) -> str:
        signature = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        name = hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:16]
        known = self.scratch / kind / f"{name}.digest"
        if not known.exists():
            write_text_atomic(known, look())
        return known.read_text()


@functools.lru_cache(maxsize=1)
def _open_parent(spec: ParentSpec) -> Parent:
    return Parent(spec)


@functools.lru_cache(maxsize=4)
def _open_store(runtime: RuntimeSpec) -> Store:
    return Store.of(runtime)
