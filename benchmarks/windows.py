"""What sliding windows cost a parent, by their length and by the length of what it reads, beside fewer KV heads.

    python -m benchmarks.windows SPEC --windows 32 64 128 --lengths 128 256 --tokens 65536

Every variant is trained in every layer as the specification says, and scored alone on held-out texts of each length:
means over layers of KL in nats per token. The cache is that of one layer for one sequence of the longest length.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from puzzle_core.architecture import Option, Variant
from puzzle_core.data import read_windows
from puzzle_core.device import available_cores, default_device
from puzzle_core.distill import bld
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import torch_dtype
from puzzle_core.model.surgery import load_weights
from puzzle_core.plan import Plan
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.scoring import score_block
from puzzle_core.sizes import variant_size
from puzzle_core.spec_file import load_spec
from tasks.runtime.context import RunContext
from tasks.stage_tasks import open_inputs, pack_tokens


def captured(plan: Plan, context: RunContext, split: str, place: Path) -> Activations:
    """The parent's states in all layers on one split."""
    pack_tokens.fn(work=plan.tokens(split), texts=plan.texts(split), context=context)
    ids_NT = read_windows(context.store().fetch(plan.tokens(split).key))
    dtype = torch_dtype(plan.spec.bld.dtype)
    activations = Activations(place / split, context.open_parent(), ids_NT, dtype, default_device())
    activations.capture_embedding()
    for layer in plan.layers:
        activations.capture_layer(layer)
    return activations


def row_of(plan: Plan, variant: Variant, training: Activations, scoring: list[Activations]) -> tuple[str, ...]:
    """One variant in every layer: its loss after training, its scores, and its cache."""
    shape, losses, scores = plan.inputs.shape, list[float](), list[list[float]]()
    for layer in plan.layers:
        with tempfile.TemporaryDirectory() as out:
            losses.append(bld.train_variant(plan.bld(layer, variant), training, None, Path(out)).final_loss)
            weights = {str(variant): load_weights(Path(out))}
        work = plan.score(layer, Option(shape.parent_block(layer).with_variant(variant)))
        scores.append([score_block(work, states, weights).kl_nats_per_token for states in scoring])
    entries = variant.seen(scoring[-1].ids_NT.shape[1]) * variant_size(shape, variant).kv_entries_per_token
    kls = (f"{statistics.mean(values):.4f}" for values in zip(*scores, strict=True))
    return str(variant), f"{4 * entries / 1024:.1f} KiB", f"{statistics.mean(losses):.4f}", *kls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--windows", type=int, nargs="+", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="ascending")
    parser.add_argument("--tokens", type=int, default=65_536, help="of BLD (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        here = [f"runtime.store={place / 'store'}", f"runtime.scratch={place / 'scratch'}"]
        spec = load_spec(options.spec, (*options.overrides, *here, f"bld.tokens={options.tokens}"))
        context = RunContext.of(spec)
        inputs = open_inputs.fn(context, spec)

        def plan_at(length: int, windows: tuple[int, ...]) -> Plan:
            parts = {
                "scoring": spec.scoring.model_copy(update={"sequence_length": length}),
                "variants": spec.variants.model_copy(update={"windows": windows}),
            }
            return Plan(spec.model_copy(update=parts), inputs)

        plan = plan_at(options.lengths[-1], tuple(options.windows))
        training = captured(plan, context, "bld", place)
        scoring = [captured(plan_at(n, ()), context, "scoring", place / str(n)) for n in options.lengths]
        asked = [v for v in plan.trained(0) if v.kv_heads]
        rows = [row_of(plan, variant, training, scoring) for variant in asked]
    title = f"Windows in {spec.parent.path}, {options.tokens:,} tokens of BLD each, means over layers"
    columns = ("variant", "cache", "loss", *(f"KL at {length}" for length in options.lengths))
    sys.stdout.write(f"{format_text(Table(title, columns, tuple(rows), text_columns=1))}\n")


if __name__ == "__main__":
    main()
