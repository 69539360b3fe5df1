"""`puzzle push`: a child and its card to a hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.arguments import STORE, Child, StoreUrl
from flows.cli.export_command import open_child

if TYPE_CHECKING:
    from tasks.store.store import Store

CARD = "README.md"


def push(
    child: Child,
    /,
    *,
    hub: Annotated[str, Parameter(metavar="ORG/NAME", help="Repository; created if it does not exist.")],
    endpoint: Annotated[
        str | None, Parameter(metavar="URL", help="Address of the hub [default: HF_ENDPOINT, or Hugging Face's own].")
    ] = None,
    private: Annotated[bool, Parameter(help="A new repository is private.")] = False,
    store: StoreUrl = STORE,
) -> None:
    """Push a child's files and its model card as one commit. The token is that of HF_TOKEN, or of `hf auth login`.

    Raises:
        SpecError: CHILD is neither a directory nor a key, or --hub is not ORG/NAME.
        StorageError: the hub does not answer, or refuses.
    """
    from tasks import hub as hub_client

    hub_client.check_target(hub, endpoint)
    directory, opened, key = open_child(child, store)
    files: dict[str, Path | bytes] = {name: directory / name for name in _names(directory, opened, key)}
    if CARD not in files:
        files[CARD] = _card(hub, directory, opened, key).encode()
    sys.stdout.write(f"{hub_client.push(hub, files, f'Child {key or directory.name}', endpoint, private)}\n")


def _names(directory: Path, store: "Store | None", key: str) -> list[str]:
    """The files of a child: those of its artifact, or all of its directory."""
    if store:
        return list(store.manifest(key).files)
    return [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]


def _card(name: str, directory: Path, store: "Store | None", key: str) -> str:
    from puzzle_core.export.card import hub_card
    from puzzle_core.export.source import Source
    from tasks.store.provenance import stored_provenance

    return hub_card(name, Source(directory).architecture, stored_provenance(store, key) if store else None)
