"""Events of this project on Prefect's server, which automations react to (prefect.yaml, deployments/automations/)."""

import re
from collections.abc import Mapping

from prefect.events import emit_event


def announce(what: str, name: str, about: Mapping[str, str]) -> None:
    """Emit the event `puzzle.WHAT` of the resource `puzzle.KIND.NAME`.

    Args:
        what: kind and happening: `library.built`, `target.added`.
        name: of the resource.
        about: what else the event says; texts, and no secrets.
    """
    kind, identity = what.partition(".")[0], re.sub(r"[^A-Za-z0-9._-]", "-", name)
    resource = {"prefect.resource.id": f"puzzle.{kind}.{identity}", "prefect.resource.name": name}
    emit_event(f"puzzle.{what}", resource=resource, payload=dict(about))
