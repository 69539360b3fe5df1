"""`puzzle import`, `puzzle export-config` and `puzzle export-library`: files of and for other projects."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puzzle_core.errors import SpecError

IMPORT_HELP = "read another project's files"


def add_import_commands(imported: argparse.ArgumentParser) -> None:
    """Give `puzzle import` its subcommands."""
    kinds = imported.add_subparsers(required=True, metavar="KIND")

    def kind(name: str, run: Callable[[Any], None], about: str) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        return added

    campaign = kind(
        "puzzletron", _import_puzzletron, "a puzzle directory of NVIDIA's Model-Optimizer, as tables to search in again"
    )
    campaign.add_argument("directory", type=Path, metavar="DIR", help="the puzzle directory")
    campaign.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the tables go")
    campaign.add_argument("--metric", metavar="NAME", help="the measure that is the score (default kl_div)")
    campaign.add_argument(
        "--stats",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="which costs to take, by their args, for instance --stats weights_dtype=int8 (default all in bfloat16)",
    )
    child = kind("block-configs", _import_block_configs, "a child's config.json, as an architecture")
    child.add_argument("config", type=Path, metavar="config.json", help="with block_configs in it")
    child.add_argument("--out", type=Path, required=True, metavar="architecture.json", help="the architecture")


def add_config_options(export: argparse.ArgumentParser) -> None:
    """The options of `puzzle export-config`."""
    export.add_argument("answer", type=Path, metavar="ANSWER", help="a search's answer, or architecture.json")
    export.add_argument("--parent-config", type=Path, required=True, metavar="FILE", help="the parent's config.json")
    export.add_argument("--out", type=Path, required=True, metavar="config.json", help="the child's")


def export_config(options: Any) -> None:
    """Write a child's `config.json` for serving engines."""
    from puzzle_core.architecture import Architecture
    from puzzle_core.formats.decilm_config import child_config
    from puzzle_core.formats.foreign_json import read_json
    from puzzle_core.records import write_text_atomic

    answer = options.answer / "architecture.json" if options.answer.is_dir() else options.answer
    parent = read_json(options.parent_config, "the parent's configuration", dict)
    config = child_config(parent, Architecture.read(answer))
    write_text_atomic(options.out, json.dumps(config, indent=1) + "\n")
    sys.stdout.write(f"{options.out}\n")


def export_library(spec: Any, out: Path) -> None:
    """Write the index of a run's block library."""
    from puzzle_core.plan import Plan
    from puzzle_core.report.library_index import Stored, library_index, library_keys
    from tasks.runtime.context import RunContext
    from tasks.stage_tasks import open_inputs

    context = RunContext.of(spec)
    plan, store = Plan(spec, open_inputs.fn(context, spec.data, spec.target)), context.store()
    there = store.keys("bld") | store.keys("score")
    manifests = store.manifests(key for key in library_keys(plan) if key in there)
    found = {key: Stored(manifest.record, manifest.size_bytes) for key, manifest in manifests.items()}
    library_index(plan, found).write(out)
    sys.stdout.write(f"{out}\n")


def _import_puzzletron(options: Any) -> None:
    from puzzle_core.interop.puzzletron import import_puzzle_dir

    pairs = [text.partition("=") for text in options.stats]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise SpecError(f"--stats {wrong[0]}: say KEY=VALUE, for instance weights_dtype=bfloat16")
    found = import_puzzle_dir(options.directory, options.out, options.metric, {key: value for key, _, value in pairs})
    lines = [
        f"{found.scores} scores by {found.metric}, over the parent's {found.parent}",
        f"costs of {found.costs.precision}; {found.costs.left} profiles with other args left out",
        "",
        "set limits in a scenario, then search:",
    ]
    tables = f"--scores {options.out / 'scores.csv'} --costs {options.out / 'costs.csv'}"
    lines += [f"  puzzle search {tables} --scenario {path} --out ANSWER" for path in found.scenarios]
    sys.stdout.write("\n".join(lines) + "\n")


def _import_block_configs(options: Any) -> None:
    from puzzle_core.formats.decilm_config import architecture_of
    from puzzle_core.formats.foreign_json import read_json

    config = read_json(options.config, "the child's configuration", dict)
    architecture_of(config, str(options.config)).write(options.out)
    sys.stdout.write(f"{options.out}\n")
