"""`puzzle report` and `puzzle cost`: the final table of a run, and what it took."""

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.cli.arguments import STORE, StoreUrl
from puzzle_core.errors import SpecError
from puzzle_core.spec import RuntimeSpec

if TYPE_CHECKING:
    from tasks.store.store import Store


def report(
    run: Annotated[str, Parameter(help="Name of a flow run or of a specification, or the key of a report.")],
    /,
    *,
    store: StoreUrl = STORE,
) -> None:
    """Print the newest report of a run.

    Raises:
        SpecError: the store has no such report; names those that it has.
    """
    from tasks.store.store import Store

    opened = Store.of(RuntimeSpec(store=store))
    print_report(opened, newest_report(opened, run))


def cost(
    run: Annotated[str, Parameter(help="Name of a flow run or of a specification, or the key of a report.")],
    /,
    *,
    store: StoreUrl = STORE,
    price_per_hour: Annotated[
        float | None, Parameter(help="Price of an hour of a GPU, or of a core where no GPU computed.")
    ] = None,
) -> None:
    """Print what the artifacts of a run took, stage by stage.

    Raises:
        SpecError: the store has no such report; names those that it has.
    """
    from puzzle_core.report.report_tables import format_text
    from puzzle_core.report.usage_table import usage_table
    from puzzle_core.work import ReportWork
    from tasks.store.references import ancestors, read_keys
    from tasks.store.stage_usage import usage_by_stage
    from tasks.store.store import Store

    opened = Store.of(RuntimeSpec(store=store))
    key = newest_report(opened, run)
    held = read_keys(ReportWork.model_validate(opened.manifest(key).work))  # of the timing, too, which has no key in it
    table = usage_table(usage_by_stage(opened, ancestors(opened, [key, *held])), price_per_hour)
    sys.stdout.write(f"{format_text(table)}\n")


def newest_report(store: "Store", run: str) -> str:
    """The key of the newest report of a run.

    Raises:
        SpecError: the store has no such report; names those that it has.
    """
    from puzzle_core.work import ReportWork

    readable = f"{ReportWork.stage}/v{ReportWork.version}/"
    manifests = [store.manifest(key) for key in store.keys(ReportWork.stage) if key.startswith(readable)]
    reports = [
        manifest for manifest in manifests if run in (manifest.key, manifest.made_by, manifest.work["spec"]["name"])
    ]
    if not reports:
        names = ", ".join(sorted({manifest.work["spec"]["name"] for manifest in manifests})) or "none"
        raise SpecError(f"{store.url} holds no report of {run!r}; its reports: {names}")
    return max(reports, key=lambda manifest: manifest.made_at).key


def print_report(store: "Store", key: str) -> None:
    """Print the final table of a report and the path of its page."""
    from puzzle_core.report.report_inputs import ReportInputs
    from puzzle_core.report.report_tables import format_final_table

    directory = store.fetch(key)
    inputs = ReportInputs.read(directory / "report.json")
    sys.stdout.write(f"\n{format_final_table(inputs)}\n\nreport: {directory / 'report.html'}\n")
