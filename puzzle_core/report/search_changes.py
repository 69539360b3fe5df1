"""What a search answers otherwise than an earlier one for the same target, and what was asked otherwise."""

from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import NONE, ms_text, number_text
from puzzle_core.search.search_record import FoundArchitecture, SearchRecord
from puzzle_core.work import SearchWork


def changes_text(before: SearchWork, earlier: SearchRecord, after: SearchWork, later: SearchRecord) -> str:
    """The differences of two searches as text: of what was asked, of score and costs, and layer by layer.

    Args:
        before: what the earlier search was asked.
        earlier: its answer.
        after: what the later search was asked.
        later: its answer.
    """
    lines = [f"Since the last search for {after.target}: {_asked(before, after)}"]
    first, second = earlier.best, later.best
    figures = [(later.objective, number_text(first.score), number_text(second.score))]
    figures += _costs(first, second)
    lines.append(
        format_text(Table(title="The answer", columns=("", "before", "now"), rows=tuple(figures), text_columns=1))
    )
    rows = _layers(first, second)
    table = Table(title="Layers that changed", columns=("layer", "before", "now"), rows=rows, text_columns=3)
    lines.append(format_text(table) if rows else "The architecture is the same.")
    return "\n\n".join(lines)


def _asked(before: SearchWork, after: SearchWork) -> str:
    """What was asked otherwise, as words."""
    differences = {
        "the parent": before.parent != after.parent,
        "the variants on offer": before.variants != after.variants,
        "the library or its scores": before.scores != after.scores or before.composition != after.composition,
        "the target's costs": (before.costs, before.cost_table) != (after.costs, after.cost_table),
        "traffic and limits": (before.request.scenarios, before.request.mix)
        != (after.request.scenarios, after.request.mix),
        "rules of the architecture": (before.request.constraints, before.request.engines)
        != (after.request.constraints, after.request.engines),
        "settings of the search": before.request.search != after.request.search,
    }
    named = [name for name, differs in differences.items() if differs]
    return f"{', '.join(named)} changed." if named else "the same was asked, by another version of the search."


def _costs(first: FoundArchitecture, second: FoundArchitecture) -> list[tuple[str, str, str]]:
    """Parameters and, where both have times, prefill plus decode in the main scenario."""
    pair = (first.prediction, second.prediction)
    rows = [("parameters", *(f"{prediction.parameters:,}" for prediction in pair))]
    if all("runtime_ms" in prediction.totals for prediction in pair):
        rows.append(("prefill and decode", *(ms_text(prediction.total_ms) for prediction in pair)))
    return [(name, before, now) for name, before, now in rows]


def _layers(first: FoundArchitecture, second: FoundArchitecture) -> tuple[tuple[str, str, str], ...]:
    blocks = [list(map(str, found.architecture.layers)) for found in (first, second)]
    count = max(map(len, blocks))
    before, now = ([*layers, *[NONE] * (count - len(layers))] for layers in blocks)
    return tuple((str(layer), *pair) for layer, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
