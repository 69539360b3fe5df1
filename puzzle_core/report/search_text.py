"""A search as text for a terminal: architectures, limits, batch sizes, layers and warnings."""

from puzzle_core.report.report_tables import LIMIT_COLUMNS, Table, format_text, limit_row
from puzzle_core.report.report_warnings import search_warnings
from puzzle_core.report.units import NONE, duration_text, number_text, percent_text
from puzzle_core.search.search_record import FoundArchitecture, SearchRecord


def answer_text(record: SearchRecord) -> str:
    """All tables and warnings of a search."""
    tables = [_solutions(record), _limits(record), _layers(record)]
    if len(record.outcomes) > 1:
        tables.insert(1, _batch_sizes(record))
    return "\n\n".join([*map(format_text, tables), *search_warnings(record)])


def _solutions(record: SearchRecord) -> Table:
    rows = [_solution_row(f"solution {rank}", solution) for rank, solution in enumerate(record.solutions, start=1)]
    rows += [_solution_row(solution.method.replace("_", " "), solution) for solution in record.baselines]
    return Table(
        title="Architectures within the limits",
        columns=("", record.objective, "bound", "gap", "proof", "solved in"),
        rows=tuple(rows),
        note="The score is the sum over layers. Solution 1 is chosen. Baselines have no proof.",
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
    rows = tuple(limit_row(use, record.prices) for use in record.best.limits)
    return Table(title="Limits", columns=LIMIT_COLUMNS, rows=rows, text_columns=3)


def _layers(record: SearchRecord) -> Table:
    others = {runner_up.layer: runner_up for runner_up in record.runner_ups}
    rows = []
    for layer, block in enumerate(record.best.architecture.layers):
        span, other = record.best.spans.get(layer, 1), others.get(layer)
        text = f"{block} x{span}" if span > 1 else str(block)
        rise = number_text(other.rise) if other and other.rise is not None else NONE
        rows.append((str(layer), text, other.other or "nothing fits" if other else NONE, rise))
    return Table(
        title="Layers",
        columns=("layer", "chosen", "runner-up", "score rise"),
        rows=tuple(rows),
        text_columns=3,
        note="A runner-up is the option of the layer when its chosen option is forbidden; all other layers may change.",
    )
