"""What sliding windows cost a parent, by their length and by the length of what it reads, beside fewer KV heads.

    python -m benchmarks.windows SPEC --windows 32 64 128 --lengths 128 256 --tokens 65536

Every variant is trained in every layer as the specification says, and scored alone on held-out texts of each length:
means over layers of KL in nats per token. The cache is that of one layer for one sequence of the longest length.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.planned import bld_options, captured, placed_spec, planned
from puzzle_core.architecture import Option, Variant
from puzzle_core.device import available_cores
from puzzle_core.distill import bld
from puzzle_core.model.activations import Activations
from puzzle_core.model.surgery import load_weights
from puzzle_core.plan import Plan
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.scoring import score_block
from puzzle_core.sizes import variant_size


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
    parser = bld_options(__doc__)
    parser.add_argument("--windows", type=int, nargs="+", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="ascending")
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        spec = placed_spec(options, place)
        whole, context = planned(spec)

        def plan_at(length: int, windows: tuple[int, ...]) -> Plan:
            parts = {
                "scoring": spec.scoring.model_copy(update={"sequence_length": length}),
                "variants": spec.variants.model_copy(update={"windows": windows}),
            }
            return Plan(spec.model_copy(update=parts), whole.inputs)

        plan = plan_at(options.lengths[-1], tuple(options.windows))
        dtype = plan.spec.bld.dtype
        training = captured(plan, context, "bld", dtype, place / "bld")
        scoring = [captured(plan_at(n, ()), context, "scoring", dtype, place / str(n)) for n in options.lengths]
        asked = [v for v in plan.trained(0) if v.kv_heads]
        rows = [row_of(plan, variant, training, scoring) for variant in asked]
    title = f"Windows in {spec.parent.path}, {options.tokens:,} tokens of BLD each, means over layers"
    columns = ("variant", "cache", "loss", *(f"KL at {length}" for length in options.lengths))
    sys.stdout.write(f"{format_text(Table(title, columns, tuple(rows), text_columns=1))}\n")


if __name__ == "__main__":
    main()
