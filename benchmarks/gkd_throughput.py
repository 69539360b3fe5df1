"""Training tokens per second of global distillation against a plain loop that trains the same child.

    python -m benchmarks.gkd_throughput --parent DIRECTORY --batch 2048 --micro-batch 512 --steps 2

`puzzle` is `puzzle_core.distill.gkd.distil` as a task runs it: models opened, windows read, loss curve, checks for
checkpoints and divergence, the child written to disk. `plain loop` is a handwritten loop for this one training: the
same models, opened before, whole logits, AdamW and nothing else. Both have the same type, batches, micro-batches,
losses, optimizer and schedule, so they must end at the same weights up to rounding: the largest difference is printed.
The ratio is tokens per second against the plain loop in the same round.

Legend: B windows of a micro-batch, T tokens, V vocabulary.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks.parents import open_parent
from benchmarks.rounds import take_turns, throughput_table
from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.data import batch_rows
from puzzle_core.device import default_device
from puzzle_core.distill import gkd
from puzzle_core.model.child import assemble, load_child, load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.model.remote.modeling_puzzle import PuzzleForCausalLM
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.spec import GkdSpec
from puzzle_core.work import AssembleWork, GkdWork

SEED = 0
"""Of the order of the windows."""


def plain_loop(parent: PuzzleForCausalLM, child: PuzzleForCausalLM, windows_NT: torch.Tensor, spec: GkdSpec) -> None:
    """One pass over the windows; trains the child in place."""
    adam, device = spec.optimizer, default_device()
    matrices, vectors = ([p for p in child.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=adam.betas, fused=True)
    windows, length = windows_NT.shape
    batch, micro = spec.batch_tokens // length, (spec.micro_batch_tokens or spec.batch_tokens) // length
    steps = windows // batch
    warmup = max(1, round(adam.warmup_share * steps))
    for step in range(steps):
        rate = adam.learning_rate * (step + 1) / warmup
        if step >= warmup:
            rate = adam.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch_rows(step, batch, windows, SEED)
        for first in range(0, batch, micro):
            ids_BT = windows_NT[rows[first : first + micro]].long().to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
                with torch.no_grad():
                    target = parent(input_ids=ids_BT, output_hidden_states=True)
                output = child(input_ids=ids_BT, output_hidden_states=True)
                pairs = zip(target.hidden_states, output.hidden_states, strict=True)
                cosine = sum(1 - F.cosine_similarity(c.float(), p.float(), dim=-1).mean() for p, c in pairs)
                parent_BTV, child_BTV = (each.logits.float().log_softmax(-1) for each in (target, output))
                kl = F.kl_div(child_BTV, parent_BTV, reduction="none", log_target=True).sum(-1).mean()
                loss = (spec.cosine_weight * cosine + spec.kl_weight * kl) * (len(ids_BT) / batch)
            loss.backward()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss of step {step} is {loss.item()}")
        torch.nn.utils.clip_grad_norm_(child.parameters(), adam.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()


def compare(parent: Parent, spec: GkdSpec, steps: int, rounds: int, threads: int, place: Path) -> Table:
    """Both contestants on a child that lacks the attention of its middle layer."""
    device, shape = default_device(), parent.shape
    length = min(256, shape.max_positions)
    generator, count = torch.Generator().manual_seed(0), steps * spec.batch_tokens // length
    ids_NT = torch.randint(shape.vocabulary, (count, length), generator=generator, dtype=torch.int32)
    tokens_dir, child_dir, out_dir = (place / name for name in ("tokens", "child", "distilled"))
    for directory in (tokens_dir, child_dir, out_dir):
        directory.mkdir()
    save_file({"tokens": ids_NT}, tokens_dir / "tokens.safetensors")
    no_attention = BlockVariant.parse(f"attn:no_op+{shape.largest_block.ffn}")
    architecture = Architecture.of_parent(shape).replace(shape.layers // 2, no_attention)
    assembling = AssembleWork(parent="p", architecture=architecture, library=(), dtype="float32")
    assemble(assembling, parent, [{} for _ in architecture.layers], child_dir)
    work = GkdWork(
        parent="p", child="c", architecture=architecture, tokens="t", dtype="float32", seed=SEED, spec=spec
    )  # fmt: skip
    parent_model = load_parent(parent, torch.float32, device)
    ends: dict[str, dict[str, torch.Tensor]] = {}

    def puzzle() -> None:
        gkd.distil(work, parent, child_dir, tokens_dir, out_dir, threads=threads)
        ends["puzzle"] = load_file(out_dir / "model.safetensors")

    def plain() -> None:
        child = load_child(child_dir, torch.float32, device)
        plain_loop(parent_model, child, ids_NT, spec)
        ends["plain loop"] = {name: p.detach().cpu() for name, p in child.named_parameters()}

    times, tokens = take_turns({"plain loop": plain, "puzzle": puzzle}, rounds), ids_NT.numel()
    title = f"GKD in {spec.dtype}: {tokens:,} tokens in batches of {spec.batch_tokens:,}, micro-batches of "
    title += f"{spec.micro_batch_tokens or spec.batch_tokens:,}, {threads} threads, {rounds} rounds"
    return throughput_table(title, tokens, times, ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, help="Hugging Face directory (default the example parent)")
    parser.add_argument("--batch", type=int, default=512, help="tokens of a step, default %(default)s")
    parser.add_argument("--micro-batch", type=int, default=256, help="tokens of a forward pass, default %(default)s")
    parser.add_argument("--steps", type=int, default=64, help="of one training, default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = GkdSpec(
        tokens=options.steps * options.batch, batch_tokens=options.batch, micro_batch_tokens=options.micro_batch,
        held_back_checks=0, dtype=options.dtype,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        parent = open_parent(options.parent, Path(place))
        table = compare(parent, spec, options.steps, options.rounds, options.threads, Path(place))
    sys.stdout.write(f"{format_text(table)}\n")


if __name__ == "__main__":
    main()
