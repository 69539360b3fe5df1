"""Whether the inputs that this process holds are those that a work names by their digests.

A key holds the digests of the parent, of the tokenizer, of texts and of a cost table as the run's start found them. A
task opens them again, on another machine perhaps, and hours later.
"""

from pathlib import Path

from puzzle_core.benchmark_items import Item, digest_items, read_items
from puzzle_core.errors import DataError, ParentError, SpecError
from puzzle_core.records import Work, digest_file, digest_files
from puzzle_core.search.table_files import read_costs
from puzzle_core.search.tables import CostTable
from puzzle_core.spec import EvaluationSpec
from puzzle_core.text_files import Document
from puzzle_core.text_sources import Texts, digest_documents, read_texts
from puzzle_core.work import (
    AssembleWork,
    BldWork,
    CostWork,
    EvaluateWork,
    GkdWork,
    ImportanceWork,
    InfluenceWork,
    ScoreWork,
    TimingWork,
    TokensWork,
)
from tasks.runtime.context import RunContext

_OF_PARENT = (ImportanceWork, InfluenceWork, BldWork, ScoreWork, AssembleWork, GkdWork, EvaluateWork)


def check_parent(work: Work, context: RunContext) -> None:
    """Compare the parent with what a work names of it; works of stages that open no parent pass.

    Raises:
        ParentError: they differ; says what was asked for and what was found.
    """
    if isinstance(work, _OF_PARENT):
        context.parent_of(work.parent)
        return
    if isinstance(work, TokensWork):
        what, expected, actual = "tokenizer", work.tokenizer, context.open_parent().tokenizer_digest
    elif isinstance(work, CostWork | TimingWork):
        what, expected, actual = "shape", work.shape, context.open_parent().shape.digest()
    else:
        return
    if expected != actual:
        raise ParentError(
            f"the {what} of the parent {context.parent.path} is not that of this run: {work.key} asks for {expected}, "
            f"and {actual} was found: its files changed since the run started, or are others on this machine; start "
            "the run again, which plans with what is there now"
        )


def read_named_documents(digest: str, texts: Texts) -> list[Document]:
    """The documents of these texts.

    Raises:
        DataError: as `read_texts`, or their digest is another one.
    """
    documents = read_texts(texts)
    actual = digest_documents(documents)
    if actual != digest:
        raise DataError(
            f"the texts {', '.join(texts.sources)} are not those of this run: their digest was {digest} when it "
            f"started, and is {actual}: they changed since, or are others on this machine; start the run again"
        )
    return documents


def read_named_benchmarks(work: EvaluateWork, evaluation: EvaluationSpec) -> dict[str, list[Item]]:
    """The items of the benchmarks of a work, by name.

    Args:
        work: names the items by their digests.
        evaluation: names the files.

    Raises:
        DataError: as `read_items`, or the digest of items is another one.
    """
    files = {task.name: task for task in evaluation.tasks}
    benchmarks = {}
    for task in work.tasks:
        items = read_items(Path(files[task.name].file), files[task.name].limit)
        if (found := digest_items(items)) != task.items:
            raise DataError(
                f"the benchmark file {files[task.name].file} is not that of this run: the digest of its items was "
                f"{task.items} when it started, and is {found}: start the run again, which reads what is there now"
            )
        benchmarks[task.name] = items
    return benchmarks


def named_task_folder(work: EvaluateWork, evaluation: EvaluationSpec) -> Path | None:
    """The folder with tasks of lm-evaluation-harness.

    Raises:
        SpecError: its digest is another one than that of the work.
    """
    if not evaluation.lm_eval.task_folder:
        return None
    folder = Path(evaluation.lm_eval.task_folder)
    if (found := digest_folder(folder)) != work.lm_eval.task_folder:
        raise SpecError(
            f"the folder {folder} of lm-evaluation-harness is not that of this run: its digest was "
            f"{work.lm_eval.task_folder} when it started, and is {found}: start the run again"
        )
    return folder


def digest_folder(folder: Path) -> str:
    """Hex digest of the names and contents of all files in a folder; hidden ones and Python's caches do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hidden = (".", "__pycache__")
    shown = (file for file in files if not any(part.startswith(hidden) for part in file.relative_to(folder).parts))
    return digest_files(shown, folder)


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
    actual = digest_file(table)
    if actual != digest:
        raise SpecError(
            f"the cost table {table} is not that of this run: its digest was {digest} when it started, and is "
            f"{actual}: start the run again, which reads the table that is there now"
        )
