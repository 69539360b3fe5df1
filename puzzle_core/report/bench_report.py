"""A comparison of parent and child in an engine: as a table, and as the trade of speed per user against all of it."""

from puzzle_core.bench.bench_record import CHILD, PARENT, BenchPoint, BenchRecord
from puzzle_core.report.plotting import BLUE, ORANGE, label_axes, log_ticks, new_figure, png_bytes
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import bytes_text, ms_text, percent_text, rate_text

COLOURS = {PARENT: BLUE, CHILD: ORANGE}
MARKS = "osD^vP*X"


def bench_text(record: BenchRecord) -> str:
    """The table for a terminal: for every batch size and context, parent, child and their ratio."""
    rows = []
    for parent, child in pairs(record):
        place = f"{parent.batch_size}", f"{parent.prompt_tokens:,}"
        for name, parent_text, child_text, ratio in _quantities(parent, child):
            rows.append((*place, name, parent_text, child_text, ratio))
            place = "", ""
    return format_text(
        Table(
            title=f"Parent and child in {record.engine} on {record.hardware}",
            columns=("batch", "prompt", "", "parent", "child", "child to parent"),
            rows=tuple(rows),
            text_columns=3,
            note=f"{record.points[0].generated_tokens} generated tokens, {record.target.threads} threads, medians of "
            f"{record.target.rounds} interleaved rounds; memory is weights and KV cache; spread (interquartile range "
            f"over median) at most {percent_text(_largest_spread(record))}",
        )
    )


def bench_figure(record: BenchRecord) -> bytes:
    """Tokens per second of one user against those of the whole batch; one line per model and context, as PNG."""
    figure = new_figure(7.0, 4.6)
    axes = figure.add_subplot()
    contexts = sorted({point.prompt_tokens for point in record.points})
    for name, colour in COLOURS.items():
        for mark, context in zip(MARKS * len(contexts), contexts, strict=False):
            points = [p for p in record.points if (p.model, p.prompt_tokens) == (name, context)]
            points.sort(key=lambda point: point.batch_size)
            users, totals = [p.user_tokens_per_s for p in points], [p.decode_tokens_per_s for p in points]
            axes.plot(users, totals, color=colour, marker=mark, label=f"{name}, {context:,} prompt tokens")
            for point in points:
                place = point.user_tokens_per_s, point.decode_tokens_per_s
                axes.annotate(f" {point.batch_size}", place, fontsize=7, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)
    title = f"Decoding in {record.engine}; numbers are batch sizes"
    label_axes(axes, title, "tokens per second of one user", "tokens per second of the whole batch")
    axes.legend(fontsize=8, frameon=False)
    return png_bytes(figure)


def pairs(record: BenchRecord) -> list[tuple[BenchPoint, BenchPoint]]:
    """Parent and child at every batch size and context."""
    parents = [point for point in record.points if point.model == PARENT]
    children = [point for point in record.points if point.model == CHILD]
    return list(zip(parents, children, strict=True))


def _quantities(parent: BenchPoint, child: BenchPoint) -> list[tuple[str, str, str, str]]:
    def of_rate(name: str, parent_rate: float, child_rate: float) -> tuple[str, str, str, str]:
        return name, rate_text(parent_rate), rate_text(child_rate), f"{child_rate / parent_rate:.2f}x"

    first = parent.timing.prefill_ms, child.timing.prefill_ms
    memory = parent.memory_bytes, child.memory_bytes
    return [
        ("time to first token", ms_text(first[0]), ms_text(first[1]), percent_text(first[1] / first[0])),
        of_rate("prefill", parent.prefill_tokens_per_s, child.prefill_tokens_per_s),
        of_rate("decode", parent.decode_tokens_per_s, child.decode_tokens_per_s),
        of_rate("decode per user", parent.user_tokens_per_s, child.user_tokens_per_s),
        ("memory", bytes_text(memory[0]), bytes_text(memory[1]), percent_text(memory[1] / memory[0])),
    ]


def _largest_spread(record: BenchRecord) -> float:
    return max(max(point.timing.prefill_spread, point.timing.decode_spread) for point in record.points)
