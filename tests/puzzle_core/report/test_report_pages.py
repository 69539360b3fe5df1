"""Pages: the files are there, hold the numbers, stand alone, and show strange names as they are."""

import base64
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from puzzle_core.report.report import (
    ReportRecord,
    escape_markdown,
    headline_sentence,
    making_table,
    render_report,
    spec_yaml,
)
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.spec import parse_spec

Make = Callable[..., ReportInputs]


@pytest.fixture(scope="module")
def written(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportRecord, Path]:
    out = tmp_path_factory.mktemp("report")
    return render_report(inputs, out), out


def test_files(written: tuple[ReportRecord, Path], inputs: ReportInputs) -> None:
    record, out = written
    assert {path.name for path in out.iterdir()} == {record.markdown, record.html, "report.json", "figures"}
    assert ReportInputs.read(out / "report.json") == inputs
    assert len(list((out / "figures").glob("*.png"))) == 6


def test_both_pages_hold_the_numbers(written: tuple[ReportRecord, Path], inputs: ReportInputs) -> None:
    record, out = written
    speedup = f"{record.headline['speedup_end_to_end']:.2f}x as fast"
    for page in ((out / record.markdown).read_text(), (out / record.html).read_text()):
        for text in (speedup, f"kept {record.headline['top1_kept'] * 100:.1f} %", "Imaginary CPU @ 3 GHz", "2.13.0"):
            assert text in page
        assert "child/v1/0123abcd" in page
        assert "time_to_first_token: 900ms" in page
        assert "KL on held-back windows 0.300 to 0.0829, least after step 128 of 128" in page
        assert "Look at this first" not in page


def test_markdown_links_the_figures(written: tuple[ReportRecord, Path]) -> None:
    record, out = written
    links = re.findall(r"!\[[^]]*]\(([^)]+)\)", (out / record.markdown).read_text())
    assert len(links) == 6
    assert all((out / link).is_file() for link in links)


def test_markdown_tables_are_whole(written: tuple[ReportRecord, Path]) -> None:
    record, out = written
    lines = (out / record.markdown).read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("| :--")]
    assert len(rules) == 8
    for number in rules:
        columns = lines[number].count("|")
        assert lines[number - 2] == ""
        block = [lines[number - 1], lines[number + 1]]
        assert all(line.startswith("|") and line.count("|") == columns for line in block)


def test_html_stands_alone(written: tuple[ReportRecord, Path]) -> None:
    record, out = written
    sources: list[str] = []

    class Images(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Images().feed((out / record.html).read_text())
    assert len(sources) == 6
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_strange_names_are_shown_as_they_are(make_inputs: Make, tmp_path: Path) -> None:
    strange = "<script>alert('$x^')</script>|*_"
    inputs = make_inputs(layers=2)  # its names could not be strange: specifications refuse them
    spec = inputs.spec.model_copy(update={"name": strange})
    inputs = inputs.model_copy(update={"spec": spec, "artifacts": {strange: "a|b"}})
    record = render_report(inputs, tmp_path)
    assert "<script" not in (tmp_path / record.html).read_text()
    assert "&lt;script&gt;" in (tmp_path / record.html).read_text()
    before_spec = (tmp_path / record.markdown).read_text().partition("The specification")[0]
    assert "<script" not in before_spec
    assert "a\\|b" in before_spec


def test_a_single_layer_without_gkd(make_inputs: Make, tmp_path: Path) -> None:
    inputs = make_inputs(layers=1, gkd=False)
    record = render_report(inputs, tmp_path)
    page = (tmp_path / record.markdown).read_text()
    assert "after GKD" not in page
    assert not (tmp_path / "figures/gkd.png").exists()
    assert record.headline["kl_nats_per_token"] == inputs.children[0].evaluation.kl_nats_per_token


def test_warnings_come_first(make_inputs: Make, tmp_path: Path) -> None:
    inputs = make_inputs(layers=1)
    search = inputs.search.model_copy(update={"omissions": {"batch size 64": "needs 3 GiB <more>"}})
    record = render_report(inputs.model_copy(update={"search": search}), tmp_path)
    assert any("batch size 64" in warning for warning in record.warnings)
    assert "needs 3 GiB &lt;more&gt;" in (tmp_path / record.html).read_text()
    page = (tmp_path / record.markdown).read_text()
    assert 0 < page.index("Look at this first") < page.index("The child beside its parent")


def test_headline_sentence(inputs: ReportInputs) -> None:
    sentence = headline_sentence(inputs)
    assert sentence.startswith(
        "The child after GKD has 59.9 % of its parent's parameters, takes 59.4 % of its memory, "
    )
    assert "runs 1.52x as fast end to end and keeps 98.8 % of its top-1 accuracy" in sentence


def test_how_it_was_made_says_which_scores_are_estimates(inputs: ReportInputs) -> None:
    scoring = inputs.spec.scoring.model_copy(update={"method": "lazy"})
    lazy = inputs.model_copy(
        update={
            "spec": inputs.spec.model_copy(update={"scoring": scoring}),
            "search": inputs.search.model_copy(update={"exact_scores": ("score/v2/1", "score/v2/2")}),
        }
    )
    rows = [dict(making_table(made).rows)["scores"] for made in (inputs, lazy)]
    end = ", estimated from gradients of the parent; 2 exactly, as the search asked for them"
    assert rows[1] == rows[0] + end


def test_spec_reads_back_and_keeps_no_place(inputs: ReportInputs) -> None:
    content = yaml.safe_load(spec_yaml(inputs))
    assert "runtime" not in content
    assert parse_spec(content, "report") == inputs.spec


def test_escape_markdown() -> None:
    assert escape_markdown("a|b\n`c` <d> attn:no_op") == "a\\|b \\`c\\` &lt;d> attn:no_op"


def test_report_needs_no_torch() -> None:
    code = (
        "import sys, puzzle_core.report.report; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
