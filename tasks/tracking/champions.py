"""Champions by hand: a child that somebody chose, for one target and scenario (`puzzle promote`)."""

from puzzle_core.errors import SpecError
from tasks.tracking.lineage_tree import known_child
from tasks.tracking.mlflow_client import mlflow_client
from tasks.tracking.tracked_models import ANSWER_TAG, promote, registered


def promote_child(uri: str, name: str, answer: str | None = None) -> list[str]:
    """Make a child the champion of a target and scenario.

    Args:
        uri: MLflow's tracking URI.
        name: of the child, as `lineage_of` takes it.
        answer: alias of the target and scenario, TARGET-SCENARIO; needed where the child has answered several.

    Returns:
        The names by which MLflow knows the child now, NAME@ALIAS.

    Raises:
        SpecError: there is no such child, it is no registered version, or `answer` is missing or not one of its own.
    """
    client = mlflow_client(uri)
    versions = registered(known_child(client, uri, name)[1])
    if not versions:
        raise SpecError(f"the child {name!r} is no registered version: run its specification again, which registers it")
    family, number = versions[0]
    version = client.get_model_version(family, number)
    answers = sorted(tag.removeprefix(ANSWER_TAG) for tag in version.tags if tag.startswith(ANSWER_TAG))
    chosen = answers if answer is None else [own for own in answers if own == answer]
    if len(chosen) != 1:
        raise SpecError(
            f"the child {name!r} answers {', '.join(answers)}, and {answer or 'none of them'} was named: give one of "
            "these with --answers"
        )
    return [f"{family}@{alias}" for alias in promote(client, version, chosen[0])]
