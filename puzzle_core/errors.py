"""Errors for the user. Every message states what was expected, what was found, and what to do.

The command line prints a `PuzzleError` and its subclasses without a traceback. Any other exception is a bug.
"""

from typing import Any

from puzzle_core.credentials import redacted


class PuzzleError(Exception):
    """Base class of all errors that are shown to the user, in whose text no address has credentials."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class SpecError(PuzzleError):
    """The run specification (or a command's arguments) is not valid."""


class ParentError(PuzzleError):
    """The parent checkpoint is missing, damaged, inconsistent or of an unsupported kind."""


class DataError(PuzzleError):
    """A text source is missing, empty, unreadable or too small."""


class NonFiniteError(PuzzleError):
    """A weight, loss, score or cost is NaN or infinite."""


class MeasurementError(PuzzleError):
    """A measurement is too noisy. Another measurement may succeed."""


class LostProcessError(PuzzleError):
    """A process of a distributed training ended without an error. A resume from the checkpoint may succeed."""


class CoverageError(PuzzleError):
    """A score or a cost that the search needs is missing."""


class InfeasibleError(PuzzleError):
    """No architecture meets the limits. `conflicts` is a minimal conflicting set (search/infeasible.py)."""

    conflicts: tuple[Any, ...] = ()


class SolveLimitError(PuzzleError):
    """A search ended at its nodes or its time limit without a solution and without a proof of infeasibility."""


class BudgetError(PuzzleError):
    """A run has computed for as many hours as its budget allows."""


class ArtifactError(PuzzleError):
    """An artifact in the store is missing or does not match its record."""


class DamagedError(ArtifactError):
    """An artifact's files differ from those that were stored."""


class ExportError(PuzzleError):
    """An export format, or the engine that reads it, does not support the child."""


class StorageError(PuzzleError):
    """The artifact store or the scratch directory cannot be written or read (disk full, no permission)."""


class TrackingError(PuzzleError):
    """MLflow does not have all records of a run whose `runtime.tracking` is `required`."""


def reason(error: BaseException) -> str:
    """The text of another library's error as one line. Its second line often names the cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__
