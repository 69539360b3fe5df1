"""Batches of the parent's states for BLD, shared by all variants that train side by side (METHOD section 3).

All trainings of a layer go through the same positions: the held-back windows, the batch of every step, the held-back
windows again. A batch is read once for all of them (puzzle_core/shared_sequence.py), or computed once: the parent then
runs from its embedding to the last layer that is trained, for the variants of several layers.

Legend: B windows of a batch, T tokens, D hidden width.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from puzzle_core.architecture import Variant
from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.data import batch_rows
from puzzle_core.distill.loop import micro_batches
from puzzle_core.model.activations import Activations, layer_input_name, post_attention_name
from puzzle_core.shared_sequence import Reader, SharedSequence, join
from puzzle_core.sizes import held_back_windows
from puzzle_core.spec import BldSource
from puzzle_core.work import BldWork

AHEAD = 4
"""Batches in memory at most that some training of the layer has not taken yet."""
TOGETHER_TOKENS = 131_072
"""Tokens of batches that go through the parent's layers together where each layer is read from its file again."""
JOIN_WITHIN = 64
"""A training that starts after the others have taken this many batches reads or computes its own."""
States = tuple[torch.Tensor, ...]
"""The states of some batches that follow each other, each (B, T, D)."""


class Schedule(NamedTuple):
    """The windows at every position of a training. Without a held-back window, all windows measure its loss."""

    windows: int
    batch_windows: int
    epochs: int
    seed: int

    @property
    def held_back(self) -> int:
        """Number of windows that are not trained on."""
        return held_back_windows(self.windows)

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return max(1, self.windows * self.epochs // self.batch_windows)

    @property
    def measuring(self) -> list[list[int]]:
        """The windows that the loss is measured on before and after the training, in batches."""
        first = self.windows - self.held_back if self.held_back else 0
        return list(micro_batches(range(first, self.windows), self.batch_windows))

    @property
    def positions(self) -> int:
        """Number of batches, those that the loss is measured on included."""
        return self.steps + 2 * len(self.measuring)

    def rows(self, position: int) -> list[int]:
        """The windows at a position."""
        measuring = self.measuring
        step = position - len(measuring)
        if 0 <= step < self.steps:
            return batch_rows(step, self.batch_windows, self.windows - self.held_back, self.seed)
        return measuring[position if step < 0 else step - self.steps]


class Batch(NamedTuple):
    """Some windows: what enters what is trained, and what leaves the parent's layer that it imitates, (B, T, D).

    `rows` are the windows, and `share` the share that they have in the batch of their position.
    """

    entering: torch.Tensor
    target: torch.Tensor
    share: float
    rows: list[int]

    def copied_to(self, device: torch.device) -> "Batch":
        """The same on a device; the copy may still be under way."""
        input_BTD, target_BTD = (states_BTD.to(device, non_blocking=True) for states_BTD in self[:2])
        return Batch(input_BTD, target_BTD, self.share, self.rows)


class Batches:
    """One training's way through its batches. As a context manager: within it, the thread has a compute slot."""

    def __init__(self, work: BldWork, activations: Activations, slot: ComputeSlot, source: BldSource):
        """The batches of the training of `work`, whose thread computes while it has `slot`."""
        windows, length = activations.ids_NT.shape
        spec = work.spec
        self.schedule = schedule = Schedule(windows, spec.batch_tokens // length, spec.epochs, work.seed)
        self._part_windows = (spec.micro_batch_tokens or spec.batch_tokens) // length
        only_ffn = isinstance(work.variant, Variant) and work.variant.subblock == "ffn"
        enters = post_attention_name if only_ffn else layer_input_name
        self._names = enters(work.layer), layer_input_name(work.last_layer + 1)
        self._copies = _Copies(activations.device)
        self._item: tuple[int, dict[str, States]] = (-1, {})
        streamed, self._together = source == "streamed", 1
        if streamed and not activations.parent.fits_cache(activations.dtype):
            self._together = min(AHEAD, max(1, TOGETHER_TOKENS // spec.batch_tokens))
        of = (str(activations.directory), activations.dtype, schedule)
        self._reader: Reader[States] = join(
            (*of, "streamed") if streamed else (*of, work.layer),
            lambda: _streamed(activations, schedule, self._together) if streamed else _stored(activations, schedule),
            frozenset(self._names),
            slot,
        )

    def __enter__(self) -> "Batches":
        self._reader.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._reader.__exit__(*failure)

    @property
    def computed_s(self) -> float:
        """Seconds for which this training has computed; it does not while it waits for others."""
        return self._reader.slot.held_s

    def at(self, position: int) -> list[Callable[[], Batch]]:
        """The micro-batches of a position, each as a function that returns it on the device.

        Positions must rise from call to call. On a GPU, the next micro-batch is copied while one is computed.
        """
        number, place = divmod(position, self._together)
        if self._item[0] != number:
            self._item = number, self._reader.take(number)
        parts = self._parts(self._item[1], place, position)

        def get(part: int) -> Batch:
            here = self._copies.finish((position, part), parts[part])
            if part + 1 < len(parts):
                self._copies.start((position, part + 1), parts[part + 1])
            elif self._together == 1 and (following := self._reader.peek(number + 1)):
                self._copies.start((position + 1, 0), self._parts(following, 0, position + 1)[0])
            return here

        return [partial(get, part) for part in range(len(parts))]

    def _parts(self, item: dict[str, States], place: int, position: int) -> list[Batch]:
        rows = self.schedule.rows(position)
        entering, target = (torch.split(item[name][place], self._part_windows) for name in self._names)
        parts = zip(entering, target, micro_batches(rows, self._part_windows), strict=True)
        return [Batch(entering_BTD, target_BTD, len(own) / len(rows), own) for entering_BTD, target_BTD, own in parts]


def _stored(activations: Activations, schedule: Schedule) -> SharedSequence[States]:
    """The batches of captured states, read from their files."""

    def load(position: int, names: frozenset[str]) -> dict[str, States]:
        rows = schedule.rows(position)
        return {name: (_pinned(activations.states(name, rows), activations),) for name in sorted(names)}

    return SharedSequence(load, ahead=AHEAD, join_within=JOIN_WITHIN, load_computes=False)


def _streamed(activations: Activations, schedule: Schedule, together: int) -> SharedSequence[States]:
    """The batches of states that the parent computes; `together` batches at a time go through each of its layers."""

    def load(number: int, names: frozenset[str]) -> dict[str, States]:
        positions = range(number * together, min((number + 1) * together, schedule.positions))
        batches = [schedule.rows(position) for position in positions]
        states = activations.compute(list(chain.from_iterable(batches)), names)
        windows = list(map(len, batches))
        return {name: torch.split(_pinned(states_BTD, activations), windows) for name, states_BTD in states.items()}

    return SharedSequence(load, ahead=AHEAD // together, join_within=JOIN_WITHIN // together, load_computes=True)


def _pinned(states_BTD: torch.Tensor, activations: Activations) -> torch.Tensor:
    """The same in memory that a GPU copies from while it computes; on a CPU as it is."""
    return states_BTD.pin_memory() if activations.device.type == "cuda" else states_BTD


class _Copies:
    """Copies to a GPU, on a stream of their own, from pinned memory; on a CPU a batch is where it is needed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._started: dict[tuple[int, int], tuple[Batch, torch.cuda.Event]] = {}

    def start(self, key: tuple[int, int], batch: Batch) -> None:
        """Begin to copy a batch."""
        if self._stream and key not in self._started:
            with torch.cuda.stream(self._stream):
                self._started[key] = batch.copied_to(self._device), self._stream.record_event()

    def finish(self, key: tuple[int, int], batch: Batch) -> Batch:
        """The copy of a batch, for use on the current stream."""
        if self._stream is None:
            return batch
        self.start(key, batch)
        (copied, event), current = self._started.pop(key), torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for states_BTD in copied[:2]:
            states_BTD.record_stream(current)
        self._started = {other: copy for other, copy in self._started.items() if other > key}
        return copied
