"""The report of one run: a Markdown page with its figures beside it, an HTML page in one file, and what they show."""

import base64
from pathlib import Path
from typing import NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from puzzle_core.records import Record, write_text_atomic
from puzzle_core.report import derived, report_tables
from puzzle_core.report.figures import all_figures
from puzzle_core.report.plotting import png_bytes
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_warnings import report_warnings
from puzzle_core.report.units import (
    count_text,
    duration_text,
    number_text,
    percent_text,
    speed_text,
    times_text,
)
from puzzle_core.report.usage_table import usage_table
from puzzle_core.spec import RoundSpec
from puzzle_core.work import CostRecord, GkdRecord

MARKDOWN, HTML, INPUTS = "report.md", "report.html", "report.json"
CAPTIONS = {
    "architecture": "Which variants each layer got, and the time that it keeps and saves.",
    "quality_against_speed": "Quality against speed: the best that the library allows at every time, what was chosen, "
    "and what other ways to choose come to.",
    "predicted_against_measured": "What the search was told, against what whole models do.",
    "scores": "What each block variant costs in quality, alone in the parent.",
    "bld": "How the variants learnt to imitate their blocks; one line per layer, smoothed.",
    "gkd": "How the child learnt from its parent end to end; strong lines are smoothed.",
}


class ReportRecord(Record):
    """Title and files of a report, its headline numbers, and its warnings."""

    title: str
    markdown: str
    html: str
    headline: dict[str, float]
    warnings: tuple[str, ...]


class _Picture(NamedTuple):
    file: str
    caption: str
    data: str


def render_report(inputs: ReportInputs, out_dir: Path) -> ReportRecord:
    """Write `report.md`, `report.html`, `report.json` (the inputs) and `figures/*.png`."""
    pictures = {name: _write_figure(name, figure, out_dir) for name, figure in all_figures(inputs).items()}
    record = ReportRecord(
        title=title(inputs),
        markdown=MARKDOWN,
        html=HTML,
        headline=derived.headline(inputs),
        warnings=tuple(report_warnings(inputs)),
    )
    environment = _environment()
    for file in (MARKDOWN, HTML):
        page = environment.get_template(f"{file}.j2").render(
            record=record,
            sentence=headline_sentence(inputs),
            pictures=pictures,
            tables={
                "final": report_tables.final_table(inputs),
                "tasks": report_tables.benchmarks_table(inputs),
                "limits": report_tables.limits_table(inputs),
                "layers": report_tables.layers_table(inputs),
                "shortlist": report_tables.shortlist_table(inputs),
                "baselines": report_tables.baselines_table(inputs),
                "predicted": report_tables.predicted_table(inputs),
                "bld": report_tables.bld_table(inputs),
                "making": making_table(inputs),
                "usage": usage_table(inputs.usages),
                "artifacts": report_tables.Table(
                    "Artifacts", ("artifact", "store key"), tuple(inputs.artifacts.items()), 2
                ),
            },
            spec=spec_yaml(inputs),
        )
        write_text_atomic(out_dir / file, page)
    inputs.write(out_dir / INPUTS)
    return record


def title(inputs: ReportInputs) -> str:
    """Run, parent, scenario and target."""
    spec = inputs.spec
    parent = inputs.parent_name or spec.parent.path
    return f"{spec.name}: a child of {parent} for {spec.scenario.name} on {spec.target.name}"


def headline_sentence(inputs: ReportInputs) -> str:
    """The result in one sentence."""
    numbers = derived.headline(inputs)
    phrases = [
        f"has {percent_text(numbers['parameters_ratio'])} of its parent's parameters",
        f"takes {percent_text(numbers['memory_ratio'])} of its memory",
    ]
    if "speedup_end_to_end" in numbers:
        phrases.append(f"runs {speed_text(numbers['speedup_end_to_end'])} end to end")
    if "top1_kept" in numbers:
        phrases.append(f"keeps {percent_text(numbers['top1_kept'])} of its top-1 accuracy")
    return (
        f"The {inputs.child.name} {', '.join(phrases[:-1])} and {phrases[-1]}; its perplexity is "
        f"{times_text(numbers['perplexity_ratio'])} the parent's, and its output differs from the parent's by a KL of "
        f"{number_text(numbers['kl_nats_per_token'])} nats per token."
    )


def making_table(inputs: ReportInputs) -> report_tables.Table:
    """How the child came to be: parent, hardware, tokens, hours, and how the search ended."""
    spec, chosen = inputs.spec, inputs.search.best
    tokens, seconds = sum(r.tokens for r in inputs.bld), sum(r.seconds for r in inputs.bld)
    estimated = "" if spec.scoring.method == "exact" else ", estimated from gradients of the parent"
    if inputs.search.exact_scores:
        estimated += f"; {len(inputs.search.exact_scores)} exactly, as the search asked for them"
    ended = "proved best" if chosen.optimal else f"gap {percent_text(chosen.gap)}"
    rows = [
        ("parent", f"{inputs.parent_name}, digest {spec.parent.path}" if inputs.parent_name else spec.parent.path),
        ("hardware", derived.hardware(inputs)),
        ("costs", _costs_text(inputs.costs)),
        ("served in", spec.target.served_dtype),
        *((f"round {number}", _round_text(earlier)) for number, earlier in enumerate(spec.rounds, start=1)),
        ("BLD", f"{len(inputs.bld)} variants, {count_text(tokens)} tokens, {duration_text(seconds)} in all"),
        ("scores", f"{len(inputs.scores)} blocks on {count_text(spec.scoring.tokens)} tokens each{estimated}"),
        (
            "search",
            f"{inputs.search.objective}, {ended}, {duration_text(chosen.seconds)}, {derived.method_name(chosen)}",
        ),
    ]
    rows += [
        (name, _gkd_text(record)) for name, record in zip(("GKD", "GKD, long windows"), inputs.trainings, strict=False)
    ]
    rows.append(("evaluation", f"{count_text(inputs.child.evaluation.tokens)} held-out tokens"))
    return report_tables.Table("How it was made", ("", ""), tuple(rows), text_columns=2)


def _gkd_text(record: GkdRecord) -> str:
    done, best = f"{count_text(record.tokens)} tokens, {duration_text(record.seconds)}", record.best
    if best is None:
        return done
    first, least = (number_text(point.kl_nats_per_token) for point in (record.held_back[0], best))
    return f"{done}; KL on held-back windows {first} to {least}, least after step {best.step} of {len(record.curve)}"


def _round_text(earlier: RoundSpec) -> str:
    limits = ", ".join(f"{name} {text}" for name, text in earlier.limits.by_name().items())
    return f"at {limits}; GKD on {count_text(earlier.gkd.tokens)} tokens"


def _costs_text(costs: CostRecord | None) -> str:
    if costs is None or costs.source != "measured":
        return costs.source if costs else "imported"
    engine = costs.engine or f"torch {costs.torch_version}"
    return f"measured: {engine}, {costs.rounds} rounds, CPU threads: {costs.threads}"


def spec_yaml(inputs: ReportInputs) -> str:
    """The specification as YAML, without `runtime`: where things lie changes nothing, and may hold a secret."""
    content = inputs.spec.model_dump(mode="json", exclude={"runtime"})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a paragraph or in a table cell."""
    for special in "\\`*[|":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.replace("<", "&lt;").split())


def _write_figure(name: str, figure: Figure, out_dir: Path) -> _Picture:
    content, file = png_bytes(figure), f"figures/{name}.png"
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    (out_dir / file).write_bytes(content)
    return _Picture(file, CAPTIONS[name], f"data:image/png;base64,{base64.b64encode(content).decode()}")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("puzzle_core.report"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment
