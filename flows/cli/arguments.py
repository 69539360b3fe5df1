"""Arguments that several subcommands of `puzzle` share, as types: what they accept, and what their help says."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from puzzle_core.spec import RuntimeSpec

STORE, MLFLOW_URI = RuntimeSpec().store, RuntimeSpec().mlflow_uri

SpecFile = Annotated[Path, Parameter(help="Run specification (YAML).")]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        metavar="KEY=VALUE",
        help="Change one key of the specification, for instance --set parent.path=/models/mine; repeatable.",
        show_default=False,
    ),
]
StoreUrl = Annotated[
    str, Parameter(name="--store", metavar="URL", help="Artifact store: a directory or s3://bucket/prefix.")
]
MlflowUri = Annotated[str, Parameter(name="--mlflow", metavar="URI", help="MLflow tracking URI.")]
Child = Annotated[str, Parameter(help="Directory of a child, or its key in --store.")]
NamedChild = Annotated[
    str,
    Parameter(help="Key, name of a specification, NAME, NAME/NUMBER or NAME@ALIAS of a registered model, or alias."),
]
NewDirectory = Annotated[
    Path,
    Parameter(metavar="DIR", validator=validators.Path(file_okay=False, dir_okay=False)),
]


def check_pair(_type: object, value: str) -> None:
    """Validate an argument of the form KEY=VALUE.

    Raises:
        ValueError: there is no key, or no equals sign.
    """
    key, equals, _ = value.partition("=")
    if not key or not equals:
        raise ValueError("write KEY=VALUE")


def check_name(_type: object, value: str | None) -> None:
    """Validate a name that becomes part of a file's name.

    Raises:
        ValueError: the name is a path.
    """
    if value is not None and (Path(value).name != value or "\\" in value):
        raise ValueError(f"{value!r} is a path: give the model's name here, and the directory with --out")
