"""What benchmarks on one specification share: their options, its plan, and the parent's states."""

import argparse
from pathlib import Path

from puzzle_core.data import read_windows
from puzzle_core.device import default_device
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import torch_dtype
from puzzle_core.plan import Plan
from puzzle_core.spec import Dtype, RunSpec
from puzzle_core.spec_file import load_spec
from tasks.runtime.context import RunContext
from tasks.stage_tasks import open_inputs, pack_tokens


def bld_options(text: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that trains variants of a specification in a store of its own."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=int, default=65_536, help="of BLD (default %(default)s)")
    return parser


def placed_spec(options: argparse.Namespace, place: Path) -> RunSpec:
    """The specification that `bld_options` name, with its store and scratch in a directory."""
    here = [f"runtime.store={place / 'store'}", f"runtime.scratch={place / 'scratch'}"]
    return load_spec(options.spec, (*options.overrides, f"bld.tokens={options.tokens}", *here))


def planned(spec: RunSpec) -> tuple[Plan, RunContext]:
    """The plan of a specification, and where its artifacts are."""
    context = RunContext.of(spec)
    return Plan(spec, open_inputs.fn(context, spec)), context


def packed(plan: Plan, context: RunContext, split: str) -> Path:
    """The directory of a split's tokens, packed if the store lacks them."""
    pack_tokens.fn(work=plan.tokens(split), texts=plan.texts(split), context=context)
    return context.store().fetch(plan.tokens(split).key)


def captured(plan: Plan, context: RunContext, split: str, dtype: Dtype, place: Path) -> Activations:
    """The parent's states in all layers on one split, in files of a directory."""
    ids_NT = read_windows(packed(plan, context, split))
    activations = Activations(place, context.open_parent(), ids_NT, torch_dtype(dtype), default_device())
    activations.capture_embedding()
    for layer in plan.layers:
        activations.capture_layer(layer)
    return activations
