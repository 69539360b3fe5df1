"""Citations of docs/design.md and docs/method.md, and links between pages, point to something that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [
    file
    for folder in ("puzzle_core", "tasks", "flows", "tests", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
]
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CITATION = re.compile(r"\b(METHOD|DESIGN)\s+(sections?|rules?)\s+(\d+)(?:\s+(?:and|to)\s+(\d+))?")
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([\w-]+))?\)")


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)


def numbers(kind: str, unit: str) -> set[int]:
    """The numbers that may be cited: of sections, or of the numbered rules of docs/design.md."""
    page = ROOT / "docs" / ("method.md" if kind == "METHOD" else "design.md")
    if unit.startswith("section"):
        return {int(heading.split(".")[0]) for heading in headings(page) if re.match(r"\d+\. ", heading)}
    rules = page.read_text().split("## 4. Rules")[1].split("\n## ")[0] if kind == "DESIGN" else ""
    return {int(number) for number in re.findall(r"^(\d+)\. ", rules, flags=re.MULTILINE)}


def broken_citations(text: str) -> list[str]:
    cited = [
        (match[0], match[1], match[2], [int(n) for n in match.groups()[2:] if n]) for match in CITATION.finditer(text)
    ]
    return [words for words, kind, unit, found in cited if not {*found} <= numbers(kind, unit)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("text", ["METHOD section 99", "DESIGN rule 11", "DESIGN section 0", "METHOD rule 1"])
def test_a_citation_of_nothing_is_found(text):
    assert broken_citations(f"{text}; METHOD section 1, DESIGN rules 1 and 3") == [text]


def test_every_citation_points_to_something():
    places = {file: broken_citations(file.read_text()) for file in CODE if file != Path(__file__)}
    assert {file.relative_to(ROOT).as_posix(): cited for file, cited in places.items() if cited} == {}
    assert sum(len(CITATION.findall(file.read_text())) for file in CODE) > 30


def test_every_link_between_pages_points_to_something():
    broken = []
    for page in PAGES:
        for target, anchor in LINK.findall(page.read_text()):
            file = (page.parent / target).resolve() if target else page
            if not file.exists() or (anchor and anchor not in map(slug, headings(file))):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert broken == []


def test_every_file_that_a_page_names_is_there():
    """Paths in backticks with a folder of this repository in front."""
    named = re.compile(r"`((?:puzzle_core|tasks|flows|tests|benchmarks|deployments|docs)/[\w/.-]+)`")
    missing = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in named.findall(page.read_text())
        if not (ROOT / path).exists()
    ]
    assert missing == []
