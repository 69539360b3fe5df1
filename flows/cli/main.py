"""The `puzzle` command: the table of its subcommands, its exit codes, and its logging.

A subcommand's module is imported when the subcommand is chosen, and what it computes with when it runs, so `--help` and
searches in tables respond at once.
"""

import logging
import os
import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from puzzle_core.errors import PuzzleError

SUBCOMMANDS = {
    "run": ("flow_commands:run", "From parent to child: library, search, child, report."),
    "build-library": ("flow_commands:build_library", "Train and score every variant of the parent's layers."),
    "search": ("search_command:search", "Choose an architecture for a specification's scenario, or from tables."),
    "targets": ("flow_commands:targets", "List hardware targets, and which of them have a search for this parent."),
    "calibrate": ("calibrate_command:calibrate", "Fit a hardware target's factors to measured serving speeds."),
    "train-child": ("flow_commands:train_child", "Assemble, distil and evaluate the chosen architecture."),
    "check": ("flow_commands:check", "Validate a specification and print the plan: stored and missing artifacts."),
    "report": ("report_command:report", "Print the final table of a run and the path of its report."),
    "cost": ("report_command:cost", "Print what a run took: core- and GPU-hours and bytes, stage by stage."),
    "export": ("export_command:export", "Write a child for a serving engine: Hugging Face directory or GGUF file."),
    "push": ("push_command:push", "Push a child and its card to a Hugging Face hub."),
    "lineage": ("lineage_command:lineage", "Show a child's lineage, and which of its artifacts the store lacks."),
    "promote": ("promote_command:promote", "Make a child the champion of its target and scenario in MLflow."),
    "bench": ("bench_command:bench", "Run a child against its parent in one engine."),
    "store": ("store_commands:app", "Inspect, verify and clean the artifact store."),
    "import": ("interop_commands:app", "Read another project's files."),
    "export-config": ("interop_commands:export_config", "Write the config.json of a searched architecture."),
    "export-library": ("interop_commands:export_library", "Write an index of the block library: keys, losses, scores."),
    "up": ("service_commands:up", "Start Prefect, a worker with all deployments, and MLflow, on loopback."),
    "down": ("service_commands:down", "Cancel the worker's runs and stop what `puzzle up` started."),
    "automations": ("service_commands:automations", "Register the shipped automations on Prefect's server."),
    "ui": ("service_commands:ui", "Serve the Prefect UI over the runs kept here, until interrupted."),
    "pretrain-example": ("pretrain_command:pretrain_example", "Train the quickstart's parent again."),
}
"""By the subcommand's name: its module in this package and its function or application there, and its help."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

app = App(
    name="puzzle",
    help="From an open-weights LLM to a cheaper child for one hardware target.",
    version_flags=(),
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    result_action="return_value",
)
app.register_install_completion_command()
for _number, (_name, (_location, _help)) in enumerate(SUBCOMMANDS.items()):
    app.command(f"{__package__}.{_location}", name=_name, help=_help, sort_key=_number)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows `puzzle`; those of the process by default.

    Returns:
        The exit code: 0 on success, 1 after a `PuzzleError`, 2 for wrong usage, 130 when interrupted.

    Raises:
        PuzzleError: with `--debug`, whatever failed.
    """
    try:
        exit_code: int | None = app.meta(sys.argv[1:] if arguments is None else arguments, exit_on_error=False)
    except CycloptsError:  # the library has printed its message
        return 2
    return exit_code or 0  # none after --help


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(help="Show tracebacks.", show_default=False)] = False,
) -> int:
    command, bound, _ = app.parse_args(tokens, exit_on_error=False)
    if command == app.help_print:  # `puzzle` or `puzzle store`, without a subcommand
        app.help_print(tokens)
        return 2
    _set_up_logging(debug)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    bypass_proxy()
    try:
        command(*bound.args, **bound.kwargs)
    except PuzzleError as error:
        if debug:
            raise
        sys.stderr.write(f"puzzle: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("puzzle: interrupted; finished artifacts are in the store, run again to continue\n")
        return 130
    return 0


def bypass_proxy() -> None:
    """Have this process and its children ask loopback addresses directly, whatever proxy the environment names."""
    present = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in present.split(",") if host.strip()]
    hosts += [host for host in LOOPBACK if host not in hosts]
    if "*" not in hosts:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def _set_up_logging(debug: bool) -> None:
    """Log this project's messages and other packages' warnings to stderr.

    Prefect's loggers of flow and task runs repeat both, with tracebacks; without `debug` only its UI shows them.
    """
    console = logging.StreamHandler()
    if not debug:
        console.addFilter(lambda record: record.name not in ("prefect.flow_runs", "prefect.task_runs"))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[console])
    for package in ("puzzle", "puzzle_core"):
        logging.getLogger(package).setLevel(logging.INFO)
