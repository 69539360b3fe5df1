"""Search from tables alone: no parent, no torch, no server (`puzzle search --scores --costs --scenario`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from puzzle_core.architecture import BlockVariant
from puzzle_core.errors import SpecError, StorageError
from puzzle_core.records import make_directory
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import find_architecture
from puzzle_core.search.search_record import FoundArchitecture, SearchRecord
from puzzle_core.search.table_files import read_costs, read_scores
from puzzle_core.spec import RunSpec, ScenarioSpec, SearchRequest
from puzzle_core.yaml_file import parse_record, read_keys, refuse_unknown

SCENARIO_KEYS = ("scenario", "more_scenarios")


def read_request(paths: Sequence[Path]) -> SearchRequest:
    """The input of a search, from scenario files.

    A file holds one scenario (`name`, `prompt_tokens`, `limits`, ...), or keys of a run specification. Of these,
    `scenario`, `more_scenarios`, `mix`, `constraints`, `engines` and `search` are read, and all others of a run are
    ignored. A key that no run has is refused. The first file's scenario is the main one. A key that several files have
    is taken from the first of them.

    Raises:
        SpecError: names the file, the key, and the nearest known one.
    """
    shared: dict[str, Any] = {}
    scenarios: list[Any] = []
    for path in paths:
        content = _read_one(path)
        scenarios += content.pop("scenarios")
        shared = content | shared
    content = shared | {"scenario": scenarios[0], "more_scenarios": scenarios[1:]}
    return parse_record(SearchRequest, content, ", ".join(map(str, paths)), "scenario")


def search_tables(
    scores: Path,
    costs: Path,
    request: SearchRequest,
    out: Path,
    *,
    score: str | None = None,
    maximise: bool = False,
    parent: BlockVariant | None = None,
    distance: bool = False,
    on_answer: Callable[[SearchRecord], None] | None = None,
) -> SearchRecord:
    """Solve, and write `search.json` (the whole answer), `architecture.json` and `frontier.csv` into `out`.

    `on_answer` gets the answer as soon as it is known, before its baselines, frontier and explanations.

    Raises:
        PuzzleError: bad tables, limits that nothing can meet.
        StorageError: `out` cannot be made or written; it is made before the search.
    """
    table = read_scores(scores, score, maximise, parent, distance)
    builder = ProblemBuilder(request, table, read_costs(costs))
    make_directory(out)
    record = find_architecture(builder, on_answer)
    try:
        record.write(out / "search.json")
        record.best.architecture.write(out / "architecture.json")
        pd.DataFrame([_row(point) for point in record.frontier]).to_csv(out / "frontier.csv", index=False)
    except OSError as error:
        raise StorageError(f"cannot write the answer to {out}: {error}") from error
    return record


def _read_one(path: Path) -> dict[str, Any]:
    content = read_keys(path, "scenario", "a scenario starts with `name:` and has `limits:`")
    if "scenario" not in content:
        parse_record(ScenarioSpec, content, str(path), "scenario")
        return {"scenarios": [content]}
    refuse_unknown(content, RunSpec, str(path), "scenario")
    more = content.get("more_scenarios") or []
    if not isinstance(more, list):
        raise SpecError(f"{path}: more_scenarios must be a list of scenarios")
    kept = {name: content[name] for name in SearchRequest.model_fields if name in content and name not in SCENARIO_KEYS}
    return kept | {"scenarios": [content["scenario"], *more]}


def _row(point: FoundArchitecture) -> dict[str, object]:
    row: dict[str, object] = {"score": point.score, "bound": point.bound, "proven": point.optimal}
    for scenario, prediction in point.predictions.items():
        row |= {f"{scenario}/batch_size": prediction.batch_size}
        row |= {f"{scenario}/{column}": total for column, total in prediction.totals.items()}
    return row | {"architecture": " ".join(str(block) for block in point.architecture.layers)}
