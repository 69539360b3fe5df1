"""`puzzle promote`: a child becomes the champion of its target and scenario in MLflow's registry."""

import sys
from typing import Annotated

from cyclopts import Parameter

from flows.cli.arguments import MLFLOW_URI, MlflowUri, NamedChild
from flows.cli.lineage_command import known_database


def promote(
    child: NamedChild,
    /,
    *,
    answers: Annotated[
        str | None,
        Parameter(metavar="TARGET-SCENARIO", help="Which of its answers, for a child that has given several."),
    ] = None,
    mlflow: MlflowUri = MLFLOW_URI,
) -> None:
    """Make a child the champion: `models:/NAME@champion` and `models:/NAME@champion-TARGET-SCENARIO` then load it.

    Raises:
        SpecError: MLflow has no such child, or it has given several answers and none of them was named.
    """
    mlflow = known_database(mlflow)
    from tasks.tracking.champions import promote_child

    for name in promote_child(mlflow, child, answers):
        sys.stdout.write(f"models:/{name}\n")
