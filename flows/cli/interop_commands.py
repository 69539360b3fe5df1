"""`puzzle import`, `puzzle export-config` and `puzzle export-library`: files of and for other projects."""

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.types import Directory, ExistingFile

from flows.cli.arguments import Overrides, SpecFile, check_pair

app = App(name="import")


@app.command(name="puzzletron")
def import_puzzletron(
    directory: Annotated[Directory, Parameter(help="The puzzle directory.")],
    /,
    *,
    out: Annotated[Directory, Parameter(metavar="DIR", help="Directory of the tables.")],
    metric: Annotated[
        str | None, Parameter(metavar="NAME", help="The measure that is the score [default: kl_div].")
    ] = None,
    stats: Annotated[
        tuple[Annotated[str, Parameter(validator=check_pair)], ...],
        Parameter(
            metavar="KEY=VALUE",
            help="Select costs by their args, for instance --stats weights_dtype=int8; repeatable "
            "[default: all in bfloat16].",
            show_default=False,
        ),
    ] = (),
) -> None:
    """Read a puzzle directory of NVIDIA's Model-Optimizer, as tables to search in."""
    from puzzle_core.interop.puzzletron import import_puzzle_dir

    pairs = (text.partition("=") for text in stats)
    imported = import_puzzle_dir(directory, out, metric, {key: value for key, _, value in pairs})
    lines = [
        f"{imported.scores} scores by {imported.metric}, over the parent's {imported.parent}",
        f"costs of {imported.costs.precision}; {imported.costs.left} profiles with other args left out",
        "",
        "set limits in a scenario, then search:",
    ]
    tables = f"--scores {out / 'scores.csv'} --costs {out / 'costs.csv'}"
    lines += [f"  puzzle search {tables} --scenario {path} --out ANSWER" for path in imported.scenarios]
    sys.stdout.write("\n".join(lines) + "\n")


@app.command(name="gguf")
def import_gguf_file(
    file: Annotated[ExistingFile, Parameter(help="A GGUF file of llama.cpp.")],
    /,
    *,
    out: Annotated[Path, Parameter(metavar="DIR", help="The parent's directory: new, or empty.")],
) -> None:
    """Read a GGUF file, as a Hugging Face parent: config, weights, tokenizer, chat templates."""
    from puzzle_core.gguf_import.import_gguf import import_gguf

    record = import_gguf(file, out)
    types = ", ".join(f"{count} {name}" for name, count in record.types.items())
    sys.stdout.write(
        f"{out}: {record.family}, {record.layers} layers, {record.parameters:,} parameters, {record.tokens:,} tokens; "
        f"tensors of the file: {types}\n"
    )


@app.command(name="block-configs")
def import_block_configs(
    config: Annotated[ExistingFile, Parameter(help="A config.json with block_configs.")],
    /,
    *,
    out: Annotated[Path, Parameter(metavar="FILE", help="The architecture.json to write.")],
) -> None:
    """Read a child's config.json, as an architecture."""
    from puzzle_core.formats.decilm_config import architecture_of
    from puzzle_core.formats.foreign_json import read_json

    content = read_json(config, "the child's configuration", dict)
    architecture_of(content, str(config)).write(out)
    sys.stdout.write(f"{out}\n")


def export_config(
    answer: Annotated[Path, Parameter(help="Directory of a search's answer, or its architecture.json.")],
    /,
    *,
    parent_config: Annotated[ExistingFile, Parameter(metavar="FILE", help="The parent's config.json.")],
    out: Annotated[Path, Parameter(metavar="FILE", help="The child's config.json to write.")],
) -> None:
    """Write a child's `config.json` for serving engines."""
    from puzzle_core.architecture import Architecture
    from puzzle_core.formats.decilm_config import decilm_child_config
    from puzzle_core.formats.foreign_json import read_json
    from puzzle_core.records import write_text_atomic

    parent = read_json(parent_config, "the parent's configuration", dict)
    architecture = Architecture.read(answer / "architecture.json" if answer.is_dir() else answer)
    write_text_atomic(out, json.dumps(decilm_child_config(parent, architecture), indent=1) + "\n")
    sys.stdout.write(f"{out}\n")


def export_library(
    spec: SpecFile,
    /,
    *,
    overrides: Overrides = (),
    out: Annotated[Path, Parameter(metavar="FILE", help="The library.json to write.")],
) -> None:
    """Write the index of a specification's block library."""
    from flows.search_architecture import known_plan
    from puzzle_core.plan import Plan
    from puzzle_core.report.library_index import StoredArtifact, library_index, library_keys
    from puzzle_core.spec_file import load_spec
    from tasks.runtime.context import RunContext
    from tasks.stage_tasks import open_inputs

    run_spec = load_spec(spec, overrides)
    context = RunContext.of(run_spec)
    inputs = open_inputs.fn(context, run_spec)
    plan, store = known_plan(Plan(run_spec, inputs), context), context.store()
    stored_keys = store.keys("bld") | store.keys("score")
    manifests = store.manifests(key for key in library_keys(plan) if key in stored_keys)
    stored = {key: StoredArtifact(manifest.record, manifest.size_bytes) for key, manifest in manifests.items()}
    library_index(plan, stored).write(out)
    sys.stdout.write(f"{out}\n")
