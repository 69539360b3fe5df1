"""The `puzzle` command. Subcommands import what they need when they run, so `--help` and tables answer at once."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flows.cli.bench_command import BENCH_HELP, add_bench_options, bench
from flows.cli.export_command import EXPORT_HELP, add_export_options, export
from flows.cli.interop_commands import (
    IMPORT_HELP,
    add_config_options,
    add_import_commands,
    export_config,
    export_library,
)
from flows.cli.lineage_command import LINEAGE_HELP, add_lineage_options, lineage
from flows.cli.store_commands import STORE_HELP, add_store_commands
from flows.services.prefect_server import PREFECT_HOME
from puzzle_core.errors import PuzzleError, SpecError
from puzzle_core.spec import RuntimeSpec
from puzzle_core.spec_file import load_spec

log = logging.getLogger("puzzle")
EXAMPLE_PARENT = Path("deployments/parents/stdlib-2m")
TARGETS = Path("deployments/targets")


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; 0 when all went well, 1 for an error that speaks to the user, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    _set_up_logging(options.debug)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options.run(options)
    except PuzzleError as error:
        if options.debug:
            raise
        sys.stderr.write(f"puzzle: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("puzzle: interrupted; what was finished is in the store, run again to go on\n")
        return 130
    return 0


def _set_up_logging(debug: bool) -> None:
    """Our own messages to stderr, and warnings of others. What Prefect logs of runs, tracebacks too, is for its UI."""
    console = logging.StreamHandler()
    if not debug:
        console.addFilter(lambda record: record.name not in ("prefect.flow_runs", "prefect.task_runs"))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[console])
    for ours in ("puzzle", "puzzle_core"):
        logging.getLogger(ours).setLevel(logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="puzzle", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Any], None], about: str, spec: bool = True, optional: bool = False
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        if spec:
            number = "?" if optional else None
            added.add_argument("spec", type=Path, metavar="SPEC.yaml", nargs=number, help="run specification")
            added.add_argument(
                "--set",
                dest="overrides",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="change one key of the specification, for instance --set parent.path=/models/mine",
            )
        return added

    command("run", _run, "from parent to child: library, search, child, report")
    command("build-library", _flow("build_library"), "train and score every variant of the parent's layers")
    search = command(
        "search", _search, "choose an architecture for a spec's target and scenario, or from tables", optional=True
    )
    _add_table_options(search)
    targets = command("targets", _targets, "list hardware targets, and which of them have a search for this parent")
    targets.add_argument(
        "--targets", type=Path, default=TARGETS, metavar="DIR", help="directory of target files (default %(default)s)"
    )
    targets.add_argument("--search", action="store_true", help="search those that have no answer yet")
    command("train-child", _flow("train_child"), "assemble, distil and evaluate the chosen architecture")
    command("check", _check, "validate a specification and print the plan: what is cached, what will be computed")
    report = command("report", _report, "print the final table of a run and where its report lies", spec=False)
    report.add_argument("name", metavar="RUN", help="name of a flow run or of a specification, or a report's key")
    report.add_argument("--store", default=RuntimeSpec().store, help="artifact store (default %(default)s)")
    add_export_options(command("export", export, EXPORT_HELP, spec=False))
    add_lineage_options(command("lineage", lineage, LINEAGE_HELP, spec=False))
    add_bench_options(command("bench", bench, BENCH_HELP, spec=False))
    ui = command("ui", _ui, "serve the Prefect UI over the runs kept here, until interrupted", spec=False)
    ui.add_argument("--port", type=int, default=4200, help="port on loopback (default %(default)s)")
    add_store_commands(commands.add_parser("store", help=STORE_HELP, description=STORE_HELP))
    add_import_commands(commands.add_parser("import", help=IMPORT_HELP, description=IMPORT_HELP))
    add_config_options(
        command("export-config", export_config, "write the config.json of a searched architecture", spec=False)
    )
    library = command("export-library", _export_library, "write an index of the block library: keys, losses, scores")
    library.add_argument("--out", type=Path, required=True, metavar="library.json", help="the index")
    pretrain = command("pretrain-example", _pretrain, "make the quickstart's parent again", spec=False)
    pretrain.add_argument("--out", type=Path, default=EXAMPLE_PARENT, help="directory (default %(default)s)")
    pretrain.add_argument("--steps", type=int, default=6000, help="optimizer steps (default %(default)s)")
    pretrain.add_argument("--processes", type=int, help="processes side by side (default one per core)")
    return parser


def _add_table_options(search: argparse.ArgumentParser) -> None:
    tables = search.add_argument_group("from tables alone, without a specification (docs/formats.md)")
    tables.add_argument("--scores", type=Path, metavar="FILE", help="scores by layer, attention and ffn")
    tables.add_argument("--costs", type=Path, metavar="FILE", help="costs by variant: memory_bytes, decode_ms, ...")
    tables.add_argument(
        "--scenario", type=Path, metavar="FILE", action="append", help="traffic and limits; may be given several times"
    )
    tables.add_argument("--out", type=Path, metavar="DIR", help="where the answer goes")
    tables.add_argument("--score", metavar="COLUMN", help="the column of --scores that is the score")
    tables.add_argument("--maximise", action="store_true", help="larger scores are better")
    tables.add_argument("--parent", metavar="BLOCK", help="the parent's own block, for instance attn:kv8+ffn:i28672")


def _search(options: Any) -> None:
    if options.spec is not None:
        _flow("search_architecture")(options)
        return
    missing = [name for name in ("scores", "costs", "scenario", "out") if not getattr(options, name)]
    if missing:
        raise SpecError(f"give a specification, or tables: --{', --'.join(missing)} missing")
    from puzzle_core.architecture import BlockVariant
    from puzzle_core.report.search_text import answer_text
    from puzzle_core.search.from_tables import read_request, search_tables

    try:
        parent = BlockVariant.parse(options.parent) if options.parent else None
    except ValueError as error:
        raise SpecError(f"--parent {options.parent!r} is no block variant: say attn:kv8+ffn:i28672") from error
    request = read_request(options.scenario)
    record = search_tables(
        options.scores,
        options.costs,
        request,
        options.out,
        score=options.score,
        maximise=options.maximise,
        parent=parent,
    )
    sys.stdout.write(f"{answer_text(record)}\n\nanswer: {options.out}\n")


def _run(options: Any) -> None:
    spec, started = load_spec(options.spec, tuple(options.overrides)), time.monotonic()
    with _prefect("flows.puzzle"):
        from flows.puzzle import puzzle
        from tasks.runtime.context import RunContext

        key = puzzle(spec)
        _print_report(RunContext.of(spec).store(), key)
    log.info("%s done in %.0f s; look at the run with `puzzle ui`", spec.name, time.monotonic() - started)


def _flow(name: str) -> Callable[[Any], None]:
    def run(options: Any) -> None:
        spec = load_spec(options.spec, tuple(options.overrides))
        with _prefect(f"flows.{name}"):
            getattr(importlib.import_module(f"flows.{name}"), name)(spec)

    return run


def _targets(options: Any) -> None:
    spec = load_spec(options.spec, tuple(options.overrides))
    from flows.cli.describe import describe_targets

    if options.search:
        with _prefect("flows.research_targets"):
            from flows.research_targets import research_targets

            research_targets(spec, str(options.targets))
    sys.stdout.write(describe_targets(spec, options.targets))


def _check(options: Any) -> None:
    spec = load_spec(options.spec, tuple(options.overrides))
    from flows.cli.describe import describe_plan

    sys.stdout.write(describe_plan(spec))


def _export_library(options: Any) -> None:
    export_library(load_spec(options.spec, tuple(options.overrides)), options.out)


def _report(options: Any) -> None:
    from puzzle_core.work import ReportWork
    from tasks.store.store import Store

    store = Store.of(RuntimeSpec(store=options.store))
    readable = f"{ReportWork.stage}/v{ReportWork.version}/"
    manifests = [store.manifest(key) for key in store.keys(ReportWork.stage) if key.startswith(readable)]
    found = [
        manifest
        for manifest in manifests
        if options.name in (manifest.key, manifest.made_by, manifest.work["spec"]["name"])
    ]
    if not found:
        known = ", ".join(sorted({manifest.work["spec"]["name"] for manifest in manifests})) or "none"
        raise SpecError(f"{options.store} holds no report of {options.name!r}; reports there: {known}")
    _print_report(store, max(found, key=lambda manifest: manifest.made_at).key)


def _print_report(store: Any, key: str) -> None:
    from puzzle_core.report.report_inputs import ReportInputs
    from puzzle_core.report.report_tables import format_final_table

    directory = store.fetch(key)
    inputs = ReportInputs.read(directory / "report.json")
    sys.stdout.write(f"\n{format_final_table(inputs)}\n\nreport: {directory / 'report.html'}\n")


def _ui(options: Any) -> None:
    from flows.services.prefect_server import own_server

    with own_server(PREFECT_HOME, options.port) as url:
        from flows.services.orphaned_runs import crash_orphans

        crash_orphans(url)
        sys.stdout.write(f"Prefect UI at {url.removesuffix('/api')}; interrupt to stop\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def _pretrain(options: Any) -> None:
    from puzzle_core.device import available_cores
    from puzzle_core.example_parent import PretrainSpec, pretrain

    record = pretrain(options.out, PretrainSpec(steps=options.steps), options.processes or available_cores())
    sys.stdout.write(f"{options.out}: {record['held_out']}\n")


@contextlib.contextmanager
def _prefect(module: str) -> Iterator[None]:
    from flows.services.prefect_server import prefect_api

    with prefect_api(PREFECT_HOME, module) as url:
        from flows.services.orphaned_runs import crash_orphans

        crash_orphans(url)
        yield
