"""Training tokens per second of blockwise local distillation against a plain loop that trains the same block.

`puzzle` is `puzzle_core.distill.bld.train_variant` as a task runs it: initial weights, mapped activations, checkpoint
check after every step, loss curve, divergence check, weights written to disk. `plain loop` is a handwritten
loop for this one training: the same modules, states in memory, AdamW and nothing else; `own block` is that loop with
the
block itself written out in torch, without transformers' modules. All have the same optimizer, schedule, clipping, loss
and batches, so they must end at the same weights: the largest difference is printed. The ratio is tokens per second
against the plain loop in the same round (issue: at least 0.95).

`--together` trains the variants one after the other and then side by side, as the tasks of a layer do, and prints what
each way reads of the captured states.

Legend: B windows of a batch, T tokens, D hidden width, H heads, d head width.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks.parents import EXAMPLE, capture, open_parent
from benchmarks.rounds import take_turns, throughput_table
from puzzle_core.architecture import Variant
from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.data import batch_rows
from puzzle_core.distill import bld
from puzzle_core.distill.training_checkpoint import Checkpoints
from puzzle_core.model.activations import Activations
from puzzle_core.model.surgery import load_weights, variant_block
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.sizes import held_back_windows
from puzzle_core.spec import BldSpec, OptimizerSpec, RuntimeSpec
from puzzle_core.spec_file import load_spec
from puzzle_core.work import BldWork

QUICKSTART = EXAMPLE.parents[1] / "specs/quickstart.yaml"
SEED = 0
"""Of the order of the windows."""
Parameters = dict[str, torch.nn.Parameter]
Forward = Callable[[torch.Tensor], torch.Tensor]


def plain_loop(
    forward: Forward, parameters: Parameters, inputs_NTD: torch.Tensor, targets_NTD: torch.Tensor, spec: BldSpec
) -> None:
    """One pass over states in memory; trains `parameters` in place."""
    adam: OptimizerSpec = spec.optimizer
    matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": adam.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=adam.betas, fused=True)
    batch = spec.batch_tokens // inputs_NTD.shape[1]
    windows = len(inputs_NTD)
    training_windows, steps, losses = windows - held_back_windows(windows), windows // batch, []
    warmup = max(1, round(adam.warmup_share * steps))
    for step in range(steps):
        rate = adam.learning_rate * (step + 1) / warmup
        if step >= warmup:
            rate = adam.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch_rows(step, batch, training_windows, SEED)
        target_BTD = targets_NTD[rows]
        loss = F.mse_loss(forward(inputs_NTD[rows]), target_BTD) / target_BTD.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), adam.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())


def block_by_hand(activations: Activations, layer: int, variant: Variant, trained: Parameters) -> Forward:
    """The block of a Llama without biases as one function; the half that is not trained is the parent's own."""
    shape, config = activations.parent.shape, activations.parent.config
    own = activations.parent.block(layer, torch.float32, activations.device)
    weight = dict(own.named_parameters()) | trained
    cos_TD, sin_TD = activations.contexts()[layer]["position_embeddings"]

    def norm(x_BTD: torch.Tensor, name: str) -> torch.Tensor:
        variance = x_BTD.square().mean(-1, keepdim=True)
        return weight[f"{name}.weight"] * (x_BTD * torch.rsqrt(variance + config.rms_norm_eps))

    def heads(x_BTD: torch.Tensor, name: str) -> torch.Tensor:
        projected = F.linear(x_BTD, weight[f"self_attn.{name}.weight"])
        return projected.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

    def rotate(x_BHTd: torch.Tensor) -> torch.Tensor:
        low, high = x_BHTd.chunk(2, -1)
        return x_BHTd * cos_TD + torch.cat((-high, low), -1) * sin_TD

    def attend(x_BTD: torch.Tensor) -> torch.Tensor:
        h = norm(x_BTD, "input_layernorm")
        q, k, v = rotate(heads(h, "q_proj")), rotate(heads(h, "k_proj")), heads(h, "v_proj")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x_BTD + F.linear(mixed.transpose(1, 2).flatten(-2), weight["self_attn.o_proj.weight"])

    def feed(x_BTD: torch.Tensor) -> torch.Tensor:
        h = norm(x_BTD, "post_attention_layernorm")
        gate, up = (F.linear(h, weight[f"mlp.{name}.weight"]) for name in ("gate_proj", "up_proj"))
        return x_BTD + F.linear(F.silu(gate) * up, weight["mlp.down_proj.weight"])

    return feed if variant.subblock == "ffn" else lambda x_BTD: feed(attend(x_BTD))


def compare(activations: Activations, layer: int, variant: Variant, spec: BldSpec, rounds: int, place: Path) -> Table:
    """All contestants on one variant of one layer."""
    parent, device, attends = activations.parent, activations.device, variant.subblock == "attn"
    contributions = place / "contributions"
    contributions.mkdir(exist_ok=True)
    save_file({f"layer.{layer}": torch.rand(parent.shape.ffn_width)}, contributions / "contributions.safetensors")
    work = BldWork(parent="", layer=layer, variant=variant, tokens="", contributions="", seed=SEED, spec=spec)
    inputs = activations.layer_input(layer) if attends else activations.post_attention(layer)
    inputs_NTD, targets_NTD = (states.clone().to(device) for states in (inputs, activations.layer_input(layer + 1)))
    frozen, context = parent.block(layer, torch.float32, device), activations.contexts()[layer]
    checkpoints = Checkpoints(place / "checkpoint.safetensors", RuntimeSpec().checkpoint_seconds)
    ends: dict[str, dict[str, torch.Tensor]] = {}

    def puzzle() -> None:
        bld.train_variant(work, activations, contributions, place, checkpoints)
        checkpoints.file.unlink(missing_ok=True)

    def plain(by_hand: bool) -> None:
        initial = bld.initial_state(activations, work, contributions)
        block = variant_block(parent, layer, variant, initial, torch.float32, device)
        parameters = {name: parameter.requires_grad_(True) for name, parameter in block.named_parameters()}
        forward = block.feed
        if by_hand:
            forward = block_by_hand(activations, layer, variant, parameters)
        elif attends:
            forward = lambda x: frozen.feed(block.attend(x, **context))  # noqa: E731
        plain_loop(forward, parameters, inputs_NTD, targets_NTD, spec)
        ends["own block" if by_hand else "plain loop"] = {n: p.detach().cpu() for n, p in parameters.items()}

    contestants = {"plain loop": lambda: plain(False), "puzzle": puzzle}
    if parent.shape.family == "llama" and not (parent.shape.mlp_bias or parent.shape.attention_out_bias):
        contestants["own block"] = lambda: plain(True)
    times, tokens = take_turns(contestants, rounds), inputs_NTD[..., 0].numel()
    ends["puzzle"] = load_weights(place)
    title = f"BLD of layer {layer} {variant}: {tokens:,} tokens in batches of {spec.batch_tokens:,}, {rounds} rounds"
    return throughput_table(title, tokens, times, ends)


def compare_together(
    activations: Activations, layer: int, variants: list[Variant], spec: BldSpec, place: Path
) -> Table:
    """The variants of a layer one after the other, and side by side, two at a time."""
    contributions = place / "contributions"
    contributions.mkdir(exist_ok=True)
    random = {f"layer.{layer}": torch.rand(activations.parent.shape.ffn_width)}
    save_file(random, contributions / "contributions.safetensors")
    read, states = {"bytes": 0, "cpu_s": 0.0}, activations.states

    def watched(name: str, rows: Sequence[int]) -> torch.Tensor:
        start = time.thread_time()
        found = states(name, rows)
        read["cpu_s"] += time.thread_time() - start
        read["bytes"] += found.numel() * found.element_size()
        return found

    def train(variant: Variant) -> None:
        torch.set_num_threads(1)
        out = place / str(variant)
        out.mkdir(exist_ok=True)
        work = BldWork(parent="", layer=layer, variant=variant, tokens="", contributions="", seed=SEED, spec=spec)
        bld.train_variant(work, activations, contributions, out, slot=ComputeSlot("cpu", most=2))

    activations.states = watched  # type: ignore[method-assign]
    rows = []
    for name, threads in (("one after the other", 1), ("side by side", len(variants))):
        read |= {"bytes": 0, "cpu_s": 0.0}
        start = time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(train, variants))
        cpu_s = time.process_time() - start
        rows.append((name, f"{read['bytes'] / 2**20:,.0f}", f"{read['cpu_s']:.2f}", f"{cpu_s:.1f}"))
    return Table(
        title=f"BLD of {len(variants)} variants of layer {layer}: {activations.ids_NT.numel():,} tokens each",
        columns=("", "MiB read", "CPU s of reading", "CPU s in all"),
        rows=tuple(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, help="Hugging Face directory (default the example parent)")
    parser.add_argument("--variants", nargs="+", default=["attn:kv2", "ffn:i256"], help="default %(default)s")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument(
        "--spec", type=Path, default=QUICKSTART, help="whose bld part is taken (default the quickstart)"
    )
    parser.add_argument("--tokens", type=int, help="of one training (default as the spec says)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="the variants side by side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = load_spec(options.spec).bld.model_copy(update={"epochs": 1})
    with tempfile.TemporaryDirectory() as place:
        parent = open_parent(options.parent, Path(place))
        whole_batches = (options.tokens or spec.tokens) // spec.batch_tokens * spec.batch_tokens
        activations = capture(parent, whole_batches, options.layer, Path(place) / "states")
        variants = [Variant.parse(variant) for variant in options.variants]
        if options.together:
            table = compare_together(activations, options.layer, variants, spec, Path(place))
            sys.stdout.write(f"{format_text(table)}\n")
            return
        for variant in variants:
            table = compare(activations, options.layer, variant, spec, options.rounds, Path(place))
            sys.stdout.write(f"{format_text(table)}\n\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
