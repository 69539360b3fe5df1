"""The result of a search: architectures with bounds, limits and prices, and the candidates that were measured."""

from typing import Literal

from pydantic import Field

from puzzle_core.architecture import Architecture
from puzzle_core.records import Record


class Prediction(Record):
    """Predicted costs of a whole model in one scenario at one batch size.

    `totals` has every column of the cost table. A property raises KeyError where the table lacks its column.
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
    """One limit: its text in the request, and in `unit` its threshold and the value of the whole architecture.

    `usage` is None for a rate of no time, which has no bound.
    """

    scenario: str
    name: str
    text: str
    unit: str
    sense: Literal["at_most", "at_least"]
    threshold: float
    usage: float | None

    @property
    def share(self) -> float | None:
        """The usage relative to the threshold."""
        return None if self.usage is None else self.usage / self.threshold


class FoundArchitecture(Record):
    """One architecture: the method that found it, its predicted score, its costs by scenario, and its limits."""

    method: str
    architecture: Architecture
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
    """One combination of batch sizes: its best score, or the reason why it has none or was not solved."""

    batch_sizes: dict[str, int]
    score: float | None
    outcome: str


class LimitPrice(Record):
    """The price of one limit: how much the best score falls when the limit is relaxed by `step`, in its unit.

    The gain lies between `at_least` and `at_most`, which are equal where it is known exactly.
    """

    scenario: str
    limit: str
    unit: str
    step: float
    at_least: float
    at_most: float


class RunnerUp(Record):
    """What a layer takes when its own option is forbidden, and how much the score rises then.

    `others` are the options that may be it, the likeliest first: one where it is certain, none where nothing fits. The
    rise lies between `at_least` and `at_most`, which are equal where it is known exactly; `at_least` is None where
    nothing fits, `at_most` also where no choice was found.
    """

    layer: int
    option: str
    others: tuple[str, ...]
    at_least: float | None
    at_most: float | None


class SearchRecord(Record):
    """The result of a search. The best architecture is the first of `solutions`.

    `times` are prefill plus decode in ms in the main scenario, by subblock variant and for `outside`, where the cost
    table has them. `largest_score` is the largest score of a single block. `omissions` has a reason by name.
    `met_time_limit`: the clock cut a solve at `search.time_limit_s`, so that another run may give another answer.
    `exact_scores` are the keys of those scores that are exact, where others are estimates. `accuracy` says how far
    computed costs are from measurements.
    """

    objective: str
    batch_sizes: dict[str, int]
    parents: dict[str, Prediction]
    times: dict[str, float]
    solutions: tuple[FoundArchitecture, ...]
    baselines: tuple[FoundArchitecture, ...]
    frontier: tuple[FoundArchitecture, ...]
    outcomes: tuple[BatchSizeOutcome, ...]
    prices: tuple[LimitPrice, ...]
    runner_ups: tuple[RunnerUp, ...]
    largest_score: float
    omissions: dict[str, str]
    met_time_limit: bool = False
    exact_scores: tuple[str, ...] = ()
    accuracy: str = Field("", exclude_if=lambda text: not text)

    @property
    def best(self) -> FoundArchitecture:
        """The best architecture."""
        return self.solutions[0]

    @property
    def parent(self) -> Prediction:
        """The parent in the main scenario."""
        return next(iter(self.parents.values()))


class Candidate(Record):
    """An architecture that was assembled and measured, the search round that found it, and its KL to the parent."""

    round: int
    rank: int
    solution: FoundArchitecture
    measured_kl: float


class RefineRecord(Record):
    """Every candidate of every round; `best` is the index of the one with the least measured KL."""

    best: int
    candidates: tuple[Candidate, ...]


def with_refinement(search: SearchRecord, refinement: RefineRecord) -> SearchRecord:
    """The search with the best measured candidate first among its solutions."""
    best = refinement.candidates[refinement.best].solution
    others = tuple(solution for solution in search.solutions if solution.architecture != best.architecture)
    return search.model_copy(update={"solutions": (best, *others)})
