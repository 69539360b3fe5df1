"""What a search answers: architectures with bounds, limits and prices, and the candidates that were measured."""

from typing import Literal

from puzzle_core.architecture import Architecture
from puzzle_core.records import Record


class Prediction(Record):
    """What an architecture is predicted to take in one scenario at one batch size, all that lies outside included.

    `totals` has every column of the cost table; the properties raise KeyError where a table lacks theirs.
    """

    batch_size: int
    totals: dict[str, float]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return round(self.totals["parameters"])

    @property
    def memory_bytes(self) -> float:
        """Parameters plus KV cache at the full context of the batch."""
        return self.totals["memory_bytes"]

    @property
    def prefill_ms(self) -> float:
        """Prefill of the batch."""
        return self.totals["prefill_ms"]

    @property
    def decode_ms(self) -> float:
        """The whole generation after the first token."""
        return self.totals["decode_ms"]

    @property
    def total_ms(self) -> float:
        """Prefill and the whole generation."""
        return self.totals["runtime_ms"]


class LimitUse(Record):
    """One limit as it was asked, and in its unit: what is allowed, and what the whole architecture uses."""

    scenario: str
    name: str
    asked: str
    unit: str
    sense: Literal["at_most", "at_least"]
    allowed: float
    used: float


class FoundArchitecture(Record):
    """One architecture and why: how it was found, its predicted score and costs by scenario, and its limits.

    `spans` says which layers' blocks replace several consecutive layers; those after them are empty.
    """

    method: str
    architecture: Architecture
    spans: dict[int, int] = {}
    score: float
    bound: float
    gap: float
    optimal: bool
    seconds: float
    predictions: dict[str, Prediction]
    limits: tuple[LimitUse, ...]

    @property
    def prediction(self) -> Prediction:
        """In the main scenario."""
        return next(iter(self.predictions.values()))


class BatchSizeOutcome(Record):
    """One combination of batch sizes, and what it came to: its best score, or why it has none or was not solved."""

    batch_sizes: dict[str, int]
    score: float | None
    outcome: str


class Price(Record):
    """What one limit costs: loosened by `step` (in the limit's unit), the score falls by `gained`."""

    scenario: str
    limit: str
    unit: str
    step: float
    gained: float


class RunnerUp(Record):
    """What a layer would take were its choice forbidden, and by how much the score would rise; none if nothing fits."""

    layer: int
    chosen: str
    other: str | None
    rise: float | None


class SearchRecord(Record):
    """The answer of a search: the chosen architecture first among `solutions`, and what it stands beside.

    `times` are prefill plus decode milliseconds by subblock variant, and of what lies `outside`, in the main scenario;
    those that the cost table does not have are missing.
    """

    objective: str
    batch_sizes: dict[str, int]
    parents: dict[str, Prediction]
    times: dict[str, float]
    solutions: tuple[FoundArchitecture, ...]
    baselines: tuple[FoundArchitecture, ...]
    frontier: tuple[FoundArchitecture, ...]
    tried: tuple[BatchSizeOutcome, ...]
    prices: tuple[Price, ...]
    runner_ups: tuple[RunnerUp, ...]
    flags: tuple[str, ...]
    skipped: dict[str, str]

    @property
    def chosen(self) -> FoundArchitecture:
        """The best architecture."""
        return self.solutions[0]

    @property
    def parent(self) -> Prediction:
        """The parent in the main scenario."""
        return next(iter(self.parents.values()))


class Candidate(Record):
    """An architecture that was assembled and measured: which round's search found it, and its KL to the parent."""

    round: int
    rank: int
    found: FoundArchitecture
    measured_kl: float


class RefineRecord(Record):
    """Every candidate of every round, and the one with the least measured KL."""

    chosen: int
    candidates: tuple[Candidate, ...]


def with_refinement(answer: SearchRecord, record: RefineRecord) -> SearchRecord:
    """The answer with the best measured candidate first among its solutions."""
    best = record.candidates[record.chosen].found
    others = tuple(found for found in answer.solutions if found.architecture != best.architecture)
    return answer.model_copy(update={"solutions": (best, *others)})
