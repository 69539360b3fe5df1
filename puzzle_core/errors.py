"""The errors a user can meet. Every message says what was asked, what was found, and what to do.

`PuzzleError` and its children are the user's to read: the command line prints them without a traceback.
Anything else that escapes is our own mistake.
"""

from typing import Any


class PuzzleError(Exception):
    """Base of all errors that speak to the user."""


class SpecError(PuzzleError):
    """The run specification (or a command's arguments) asks for something that cannot be."""


class ParentError(PuzzleError):
    """The parent checkpoint is missing, damaged, inconsistent or of an unsupported kind."""


class DataError(PuzzleError):
    """A text source is missing, empty, unreadable or too small."""


class NonFiniteError(PuzzleError):
    """A NaN or an infinity where a number must be: in weights, losses, scores or costs."""


class MeasurementError(PuzzleError):
    """A measurement drowned in noise; measuring again may help."""


class LostProcessError(PuzzleError):
    """A process of a training that several share ended without a word; going on from the checkpoint may help."""


class CoverageError(PuzzleError):
    """A score or a cost that the search needs is missing."""


class InfeasibleError(PuzzleError):
    """No architecture meets the limits; `conflicts` are the fewest that cannot hold together (search/infeasible.py)."""

    conflicts: tuple[Any, ...] = ()


class TimeLimitError(PuzzleError):
    """A search ended by its time limit with neither an answer nor a proof that there is none."""


class ArtifactError(PuzzleError):
    """An artifact in the store is missing or is not what its record says."""


class DamagedError(ArtifactError):
    """An artifact's files are not those that were stored."""


class ExportError(PuzzleError):
    """A child is what an export format, or the engine that reads it, cannot carry."""


class StorageError(PuzzleError):
    """The artifact store or the scratch directory cannot be written or read (disk full, no permission)."""


def reason(error: BaseException) -> str:
    """The text of another library's error as one line: what is wrong often stands on its second line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__
