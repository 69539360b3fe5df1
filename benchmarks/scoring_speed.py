"""Replace-1-block scores from stored activations against full forward passes of the modified model.

`stored` is `puzzle_core.scoring.score_block`: the suffix of the parent from the states that enter the replaced block.
`full` puts the same block variant into the whole parent and runs that from the tokens on. Both build the block variant
from its weights each time, read the parent's kept log-probabilities, and compute KL, loss increase and top-1
agreement; the
capture of the states, done once for all scores of a library, is timed apart. Both compare as many tokens at a time.
Every block variant of the quickstart's search space is scored, dealt out over the layers so that each layer has
equally many, as a small sample of a whole library.
The scores of both must be equal: the largest difference is printed. The ratio is the time of `full` over that of
`stored` in the same round (issue: at least 1.7 at 8 layers, growing towards 2 with depth).

Legend: B windows of a batch, T tokens, V vocabulary.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.parents import capture, open_parent, random_parent
from benchmarks.rounds import ratio, take_turns
from puzzle_core import scoring
from puzzle_core.architecture import BlockVariant, Option
from puzzle_core.distill.losses import kl_divergence
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.model.surgery import Subblocks, load_subblocks
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.spec import VariantsSpec
from puzzle_core.state_dict import State
from puzzle_core.work import ScoreWork

COLUMNS = ("layers", "scores", "stored, s", "full, s", "ratio [least, most]", "in CPU time", "capture, s", "difference")


class Replaced(nn.Module):
    """A block variant in the place of a layer."""

    def __init__(self, block: Subblocks):
        super().__init__()
        self.block = block

    def forward(self, hidden_BTD: torch.Tensor, **context: object) -> torch.Tensor:
        return self.block(hidden_BTD, **context)


def deal(parent: Parent) -> list[tuple[int, BlockVariant]]:
    """Layers and block variants to score: every variant at least once, and every layer equally often."""
    spec = VariantsSpec(kv_heads=(4, 2, 1), ffn_ratios=(0.75, 0.5, 0.25), linear=True, no_op=True)
    blocks, layers = spec.blocks_of_layer(0, parent.shape)[1:], parent.shape.layers
    random.Random(0).shuffle(blocks)
    count = -(-len(blocks) // layers) * layers
    return [(number % layers, blocks[number % len(blocks)]) for number in range(count)]


def initial_weights(parent: Parent, layer: int, block: BlockVariant) -> dict[str, State]:
    """Training-free weights of the subblocks that are not the parent's own, by variant id."""
    tensors, shape, contribution_I = parent.layer_tensors(layer), parent.shape, torch.rand(parent.shape.ffn_width)
    changed = [variant for variant in block.subblocks if variant not in shape.largest_block.subblocks]
    return {str(v): v.row.initial_state(tensors, shape, v.size, contribution_I) for v in changed}


@torch.no_grad()
def full_pass(
    model: PuzzleForCausalLM, activations: Activations, layer: int, block: BlockVariant, weights: dict[str, State]
) -> tuple[float, float, float]:
    """KL, loss increase and agreement from whole forward passes of the parent with this layer replaced."""
    dtype, device, ids_NT = activations.dtype, activations.device, activations.ids_NT
    own, model.model.layers[layer] = (
        model.model.layers[layer],
        Replaced(load_subblocks(activations.parent, layer, Option(block), weights, dtype, device)),
    )
    kl = loss_increase = agreed = 0.0
    few = max(1, scoring.COMPARED_TOKENS // ids_NT.shape[1])
    for rows in (slice(first, first + few) for first in range(0, len(ids_NT), few)):
        ids_BT = ids_NT[rows].long().to(device)
        parent_BTV = activations.predictions(rows)(slice(None)).unflatten(0, ids_BT.shape)
        child_BTV = model(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
        kl += kl_divergence(parent_BTV, child_BTV).sum(dtype=torch.float64).item()
        following_BT1 = ids_BT[:, 1:, None]
        lost = parent_BTV[:, :-1].gather(-1, following_BT1) - child_BTV[:, :-1].gather(-1, following_BT1)
        loss_increase += lost.sum(dtype=torch.float64).item()
        agreed += (parent_BTV.argmax(-1) == child_BTV.argmax(-1)).sum().item()
    model.model.layers[layer] = own
    predictions = ids_NT.numel() - len(ids_NT)
    return max(kl / ids_NT.numel(), 0.0), loss_increase / predictions, agreed / ids_NT.numel()


def compare(parent: Parent, tokens: int, rounds: int, place: Path) -> tuple[str, ...]:
    """One row of the table: both ways on one parent."""
    started = time.perf_counter()
    activations = capture(parent, tokens, parent.shape.layers - 1, place)
    activations.capture_log_probabilities()
    captured_s = time.perf_counter() - started
    cases = [(layer, block, initial_weights(parent, layer, block)) for layer, block in deal(parent)]
    model = load_parent(parent, activations.dtype, activations.device)
    stored_scores: list[tuple[float, float, float]] = []
    full_scores: list[tuple[float, float, float]] = []

    def stored() -> None:
        stored_scores.clear()
        for layer, block, weights in cases:
            work = ScoreWork(parent="", layer=layer, block=block, attention=None, ffn=None, tokens="", dtype="float32")
            score = scoring.score_block(work, activations, weights)
            values = score.kl_nats_per_token, score.lm_loss_increase_nats_per_token, score.top1_agreement
            stored_scores.append(values)

    def full() -> None:
        full_scores[:] = [full_pass(model, activations, *case) for case in cases]

    times = take_turns({"stored": stored, "full": full}, rounds)
    pairs = zip(stored_scores, full_scores, strict=True)
    difference = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    return (
        str(parent.shape.layers),
        str(len(cases)),
        *(f"{statistics.median(times[name].wall_s):.2f}" for name in ("stored", "full")),
        ratio(times["full"].wall_s, times["stored"].wall_s),
        ratio(times["full"].cpu_s, times["stored"].cpu_s),
        f"{captured_s:.2f}",
        f"{difference:.1e}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, help="Hugging Face directory (default the example parent)")
    parser.add_argument("--depths", nargs="*", type=int, default=[16], help="of random parents of the same shape")
    parser.add_argument("--tokens", type=int, default=4096, help="that are scored (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        first = open_parent(options.parent, Path(place))
        rows = [compare(first, options.tokens, options.rounds, Path(place) / "states")]
        for layers in options.depths:
            parent = random_parent(first, layers, Path(place))
            rows.append(compare(parent, options.tokens, options.rounds, Path(place) / f"states-{layers}"))
    title = f"Scores from stored activations against full passes: {options.tokens:,} tokens, {options.rounds} rounds"
    sys.stdout.write(f"{format_text(Table(title=title, columns=COLUMNS, rows=tuple(rows), text_columns=0))}\n")


if __name__ == "__main__":
    main()
