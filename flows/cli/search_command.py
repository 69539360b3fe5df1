"""`puzzle search`: an architecture for a specification, or from tables of scores and costs alone."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from flows.cli.arguments import Overrides
from puzzle_core.errors import SpecError

if TYPE_CHECKING:
    from puzzle_core.search.search_record import SearchRecord

TABLES = Group("From tables alone, without a specification (docs/formats.md)", sort_key=1)


def search(
    spec: Annotated[Path | None, Parameter(help="Run specification (YAML).")] = None,
    /,
    *,
    overrides: Overrides = (),
    scores: Annotated[
        Path | None, Parameter(group=TABLES, metavar="FILE", help="Scores by layer, attention and ffn.")
    ] = None,
    costs: Annotated[
        Path | None, Parameter(group=TABLES, metavar="FILE", help="Costs by variant: memory_bytes, decode_ms, ...")
    ] = None,
    scenario: Annotated[
        tuple[Path, ...],
        Parameter(group=TABLES, metavar="FILE", help="Traffic and limits; repeatable.", show_default=False),
    ] = (),
    out: Annotated[Path | None, Parameter(group=TABLES, metavar="DIR", help="Directory of the answer.")] = None,
    score: Annotated[
        str | None, Parameter(group=TABLES, metavar="COLUMN", help="The column of --scores that is the score.")
    ] = None,
    maximise: Annotated[bool, Parameter(group=TABLES, help="Larger scores are better.")] = False,
    distance: Annotated[
        bool,
        Parameter(
            group=TABLES, help="The score is a distance to the parent: its own block scores 0 where it has no row."
        ),
    ] = False,
    parent: Annotated[
        str | None,
        Parameter(group=TABLES, metavar="BLOCK", help="The parent's own block, for instance attn:kv8+ffn:i28672."),
    ] = None,
) -> None:
    """Search with a specification's library and costs, or with tables.

    Raises:
        SpecError: there is neither a specification nor every table, or `--parent` is not a block variant.
    """
    if spec is not None:
        from flows.cli.flow_commands import search_spec

        search_spec(spec, overrides)
        return
    if not (scores and costs and scenario and out):
        tables = {"scores": scores, "costs": costs, "scenario": scenario, "out": out}
        missing = ", --".join(name for name, value in tables.items() if not value)
        raise SpecError(f"give a specification, or tables: --{missing} missing")
    from puzzle_core.architecture import BlockVariant
    from puzzle_core.report.search_text import answer_text, explanation_text
    from puzzle_core.search.from_tables import read_request, search_tables

    try:
        parent_block = BlockVariant.parse(parent) if parent else None
    except ValueError as error:
        raise SpecError(f"--parent {parent!r} is no block variant: use attn:kv8+ffn:i28672") from error
    request = read_request(scenario)

    def print_answer(record: "SearchRecord") -> None:
        sys.stdout.write(f"{answer_text(record)}\n\n")
        sys.stdout.flush()

    record = search_tables(
        scores, costs, request, out, score=score, maximise=maximise, parent=parent_block, distance=distance,
        on_answer=print_answer,
    )  # fmt: skip
    sys.stdout.write(f"{explanation_text(record)}\n\nanswer: {out}\n")
