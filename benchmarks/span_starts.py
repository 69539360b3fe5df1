"""What a block in the place of several layers should start from: the first layer, the last one, or their mean.

    python -m benchmarks.span_starts SPEC --tokens 65536

The parent's own block is trained in the place of every two and three consecutive layers, from each start, on the same
tokens in the same order. The table has the loss on held-back windows before and after, a mean over all places.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.planned import bld_options, captured, placed_spec, planned
from puzzle_core.architecture import Option
from puzzle_core.device import available_cores
from puzzle_core.distill import bld
from puzzle_core.model.activations import Activations
from puzzle_core.model.parent import Parent
from puzzle_core.model.surgery import WEIGHTS
from puzzle_core.plan import Plan
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.state_dict import State
from puzzle_core.work import BldRecord

SPANS = (2, 3)
STARTS = ("first", "last", "mean")


def start_of(parent: Parent, layer: int, span: int, start: str) -> State:
    """The weights of both halves, from the layers that the block replaces."""
    replaced = [parent.layer_tensors(number) for number in range(layer, layer + span)]
    if start == "mean":
        return {name: torch.stack([t[name].float() for t in replaced]).mean(0) for name in replaced[0]}
    return {name: tensor.float() for name, tensor in replaced[0 if start == "first" else -1].items()}


def trained(plan: Plan, activations: Activations, layer: int, span: int, start: str, place: Path) -> BldRecord:
    """The training of the parent's own block in the place of these layers."""
    option = Option(plan.inputs.shape.parent_block(layer), span)
    place.mkdir(parents=True)
    state = start_of(activations.parent, layer, span, start)
    halves = []
    for number, half in enumerate(("attention", "ffn")):
        directory = place / half
        directory.mkdir()
        save_file(state if number == 0 else {}, directory / WEIGHTS)  # the first file has both halves
        halves.append(directory)
    return bld.train_variant(plan.bld(layer, option), activations, None, place, halves=(halves[0], halves[1]))


def main() -> None:
    options = bld_options(__doc__).parse_args()
    torch.set_num_threads(available_cores())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        spec = placed_spec(options, place)
        plan, context = planned(spec)
        activations = captured(plan, context, "bld", plan.spec.bld.dtype, place / "states")
        for span in SPANS:
            for start in STARTS:
                found = [
                    trained(plan, activations, layer, span, start, place / f"{span}-{start}-{layer}")
                    for layer in plan.layers[: len(plan.layers) - span + 1]
                ]
                means = [
                    statistics.mean(losses)
                    for losses in zip(*((r.initial_loss, r.final_loss) for r in found), strict=True)
                ]
                rows.append((str(span), start, str(len(found)), *(f"{mean:.4f}" for mean in means)))
    title = f"Starts of blocks that replace several layers of {spec.parent.path}, {options.tokens:,} tokens each"
    table = Table(title, ("layers", "start", "places", "loss before", "loss after"), tuple(rows), text_columns=2)
    sys.stdout.write(f"{format_text(table)}\n")


if __name__ == "__main__":
    main()
