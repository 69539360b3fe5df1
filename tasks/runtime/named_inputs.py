"""Whether the inputs that this process holds are those that a work names by their digests.

A key holds the digests of the parent, of the tokenizer, of texts and of a cost table as the run's start found them. A
task opens them again, on another machine perhaps, and hours later.
"""

from pathlib import Path

from puzzle_core.errors import DataError, ParentError, SpecError
from puzzle_core.records import Work, digest_file
from puzzle_core.search.table_files import read_costs
from puzzle_core.search.tables import CostTable
from puzzle_core.text_sources import Document, Texts, digest_documents, read_texts
from puzzle_core.work import (
    AssembleWork,
    BldWork,
    CostWork,
    EvaluateWork,
    GkdWork,
    ImportanceWork,
    ScoreWork,
    TimingWork,
    TokensWork,
)
from tasks.runtime.context import RunContext

_OF_PARENT = (ImportanceWork, BldWork, ScoreWork, AssembleWork, GkdWork, EvaluateWork)


def check_parent(work: Work, context: RunContext) -> None:
    """Compare the parent with what a work names of it; works of stages that open no parent pass.

    Raises:
        ParentError: they differ; says what was asked for and what was found.
    """
    if isinstance(work, _OF_PARENT):
        context.parent_of(work.parent)
        return
    if isinstance(work, TokensWork):
        what, asked, found = "tokenizer", work.tokenizer, context.open_parent().tokenizer_digest
    elif isinstance(work, CostWork | TimingWork):
        what, asked, found = "shape", work.shape, context.open_parent().shape.digest()
    else:
        return
    if asked != found:
        raise ParentError(
            f"the {what} of the parent {context.parent.path} is not that of this run: {work.key} asks for {asked}, and "
            f"{found} was found: its files changed since the run started, or are others on this machine; start the run "
            "again, which plans with what is there now"
        )


def read_named_documents(digest: str, texts: Texts) -> list[Document]:
    """The documents of these texts.

    Raises:
        DataError: as `read_texts`, or their digest is another one.
    """
    documents = read_texts(texts)
    found = digest_documents(documents)
    if found != digest:
        raise DataError(
            f"the texts {', '.join(texts.sources)} are not those of this run: their digest was {digest} when it "
            f"started, and is {found}: they changed since, or are others on this machine; start the run again"
        )
    return documents


def read_named_costs(digest: str | None, table: Path) -> CostTable:
    """The cost table in a file.

    Raises:
        SpecError: as `read_costs`, or the file's digest is another one.
    """
    _check_table(digest, table)
    costs = read_costs(table)
    _check_table(digest, table)
    return costs


def _check_table(digest: str | None, table: Path) -> None:
    found = digest_file(table)
    if found != digest:
        raise SpecError(
            f"the cost table {table} is not that of this run: its digest was {digest} when it started, and is {found}: "
            "start the run again, which reads the table that is there now"
        )
