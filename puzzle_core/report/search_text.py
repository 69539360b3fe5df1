"""A search as text for a terminal: first its answer, then what explains it."""

from puzzle_core.report.report_tables import LIMIT_COLUMNS, Table, format_text, limit_row
from puzzle_core.report.report_warnings import answer_warnings, omissions
from puzzle_core.report.units import NONE, duration_text, number_text, percent_text, range_text
from puzzle_core.search.search_record import FoundArchitecture, RunnerUp, SearchRecord

PRICED = 3
"""Columns of a limit that name it, and that come last in LIMIT_COLUMNS: step and gain."""


def answer_text(record: SearchRecord) -> str:
    """The architecture, its limits and its layers, with warnings."""
    rows = tuple(f"solution {rank}" for rank in range(1, len(record.solutions) + 1))
    tables = [
        _architectures(record, dict(zip(rows, record.solutions, strict=True)), "The first solution is chosen."),
        _limits(record),
        _layers(record),
    ]
    if len(record.outcomes) > 1:
        tables.insert(1, _batch_sizes(record))
    return "\n\n".join([*map(format_text, tables), *answer_warnings(record)])


def explanation_text(record: SearchRecord) -> str:
    """Other ways to choose, what looser limits gain, what each layer would take instead, and what was left out."""
    baselines = {solution.method.replace("_", " "): solution for solution in record.baselines}
    tables = [
        _architectures(record, baselines, "Other ways to choose within the same limits. They have no proof."),
        _prices(record),
        _runner_ups(record),
    ]
    return "\n\n".join([*(format_text(table) for table in tables if table.rows), *omissions(record)])


def _architectures(record: SearchRecord, solutions: dict[str, FoundArchitecture], note: str) -> Table:
    return Table(
        title="Architectures within the limits",
        columns=("", record.objective, "bound", "gap", "proof", "solved in"),
        rows=tuple(_solution_row(name, solution) for name, solution in solutions.items()),
        note=f"The score is the sum over layers. {note}",
    )


def _solution_row(name: str, solution: FoundArchitecture) -> tuple[str, ...]:
    proof = "optimal" if solution.optimal else NONE
    seconds = duration_text(solution.seconds)
    return name, number_text(solution.score), number_text(solution.bound), percent_text(solution.gap), proof, seconds


def _batch_sizes(record: SearchRecord) -> Table:
    rows = []
    for result in record.outcomes:
        chosen = " (chosen)" if result.batch_sizes == record.batch_sizes else ""
        sizes = ", ".join(f"{scenario} {size}" for scenario, size in result.batch_sizes.items())
        rows.append((sizes + chosen, result.outcome, NONE if result.score is None else number_text(result.score)))
    return Table(
        title="Batch sizes",
        columns=("batch sizes", "outcome", record.objective),
        rows=tuple(rows),
        text_columns=2,
    )


def _limits(record: SearchRecord) -> Table:
    rows = tuple(limit_row(use, ())[:-2] for use in record.best.limits)
    return Table(title="Limits", columns=LIMIT_COLUMNS[:-2], rows=rows, text_columns=3)


def _layers(record: SearchRecord) -> Table:
    chosen = record.best.architecture
    rows = [(str(layer), str(chosen.options.get(layer, block))) for layer, block in enumerate(chosen.layers)]
    return Table(title="Layers", columns=("layer", "chosen"), rows=tuple(rows), text_columns=2)


def _prices(record: SearchRecord) -> Table:
    rows = tuple(limit_row(use, record.prices) for use in record.best.limits) if record.prices else ()
    return Table(
        title="What a looser limit gains",
        columns=(*LIMIT_COLUMNS[:PRICED], *LIMIT_COLUMNS[-2:]),
        rows=tuple((*row[:PRICED], *row[-2:]) for row in rows),
        text_columns=PRICED,
    )


def _runner_ups(record: SearchRecord) -> Table:
    return Table(
        title="Runners-up",
        columns=("layer", "runner-up", "score rise"),
        rows=tuple((str(other.layer), _others(other), _rise(other)) for other in record.runner_ups),
        text_columns=2,
        note="What a layer takes when its chosen option is forbidden; all other layers may change. Where exact values "
        "would take too much work, the rise is an interval, and the likeliest option is named.",
    )


def _others(other: RunnerUp) -> str:
    if not other.others:
        return "nothing fits" if other.at_least is None else "none found"
    more = len(other.others) - 1
    return other.others[0] + (f" or {more} more" if more else "")


def _rise(other: RunnerUp) -> str:
    return NONE if other.at_least is None else range_text(other.at_least, other.at_most)
