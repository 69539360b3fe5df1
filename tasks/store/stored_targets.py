"""Hardware targets in the artifact store, where every machine finds them: objects `targets/NAME.json`.

They are requests and no artifacts: they may be replaced, and garbage collection leaves them.
"""

import re

from puzzle_core.errors import SpecError
from puzzle_core.records import Record
from puzzle_core.spec import ScenarioSpec
from puzzle_core.target import TargetSpec
from tasks.store.store import Store

TARGETS = "targets"


class StoredTarget(Record):
    """A target that re-searches read, with traffic of its own or that of the specification.

    `added_by` names the run that stored it.
    """

    target: TargetSpec
    scenario: ScenarioSpec | None = None
    added_by: str = ""

    @property
    def name(self) -> str:
        """The name of its object: that of the target, and of the scenario if it has one."""
        return f"{self.target.name}--{self.scenario.name}" if self.scenario else self.target.name


def store_target(store: Store, stored: StoredTarget, replace: bool) -> str:
    """Write a target into the store.

    Args:
        store: where.
        stored: the target.
        replace: whether one of its name may be there.

    Returns:
        The object's path in the store.

    Raises:
        SpecError: the store has another target of this name, and `replace` is false.
    """
    path = f"{TARGETS}/{re.sub(r'[^A-Za-z0-9._+-]', '_', stored.name)}.json"
    data = stored.model_dump_json(indent=1, exclude_defaults=True).encode() + b"\n"
    present = store.documents(TARGETS).get(path)
    if (
        present is not None
        and not replace
        and parsed(present, path).model_copy(update={"added_by": ""}) != (stored.model_copy(update={"added_by": ""}))
    ):
        raise SpecError(f"{store.place} has another target {path}: give this one another name, or set replace")
    store.write_document(path, data)
    return path


def parsed(data: bytes, path: str) -> StoredTarget:
    """The target of an object.

    Raises:
        SpecError: it does not hold one.
    """
    try:
        return StoredTarget.model_validate_json(data)
    except ValueError as error:
        raise SpecError(f"{path} of the store holds no target: add it again, or remove it: {error}") from error
