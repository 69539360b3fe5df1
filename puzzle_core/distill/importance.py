"""Channel contributions of every FFN from one pass over calibration tokens (Puzzle paper, appendix A).

C_i = mean over tokens of |x_i| * ||W_down[:, i]||_2, where x is the input of the down projection.
Legend: L layers, I intermediate width, N windows, T tokens, D hidden width.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from puzzle_core.data import read_positions, read_windows
from puzzle_core.device import default_device
from puzzle_core.errors import NonFiniteError
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.activations import FORWARD_TOKENS, block_contexts
from puzzle_core.model.parent import Parent
from puzzle_core.progress import Report, no_report
from puzzle_core.work import ImportanceRecord, ImportanceWork


@torch.no_grad()
def measure_contributions(
    work: ImportanceWork, parent: Parent, tokens_dir: Path, out_dir: Path, report: Report = no_report
) -> ImportanceRecord:
    """Measure channel contributions and write them to `contributions.safetensors`.

    There is one float32 tensor (I,) per layer, and none of a layer whose FFN has no channels.

    Args:
        report: called after every batch of every layer.

    Raises:
        NonFiniteError: a contribution is NaN or infinite; the message names the layer.
    """
    ids_NT, dtype, device = read_windows(tokens_dir), torch.float32, default_device()
    rows = max(1, FORWARD_TOKENS // ids_NT.shape[1])
    embed = parent.outside(dtype, device).model.embed
    hidden = [embed(batch.long().to(device)) for batch in torch.split(ids_NT, rows)]
    positions_NT = read_positions(tokens_dir)
    same = block_contexts(parent, torch.arange(ids_NT.shape[1])[None], dtype, device)
    down = FAMILIES[parent.shape.family].ffn_names.down
    contributions: dict[str, torch.Tensor] = {}
    for layer in range(parent.shape.layers):
        block, width = parent.block(layer, dtype, device), parent.shape.parent_block(layer).ffn.ffn_width
        total_I = torch.zeros(width, dtype=torch.float64)
        channels_of = without(block.ffn_subblock, down) if width else None
        for batch, input_BTD in enumerate(hidden):
            contexts = same
            if positions_NT is not None:
                contexts = block_contexts(parent, positions_NT[batch * rows : (batch + 1) * rows], dtype, device)
            post_attention = block.attend(input_BTD, **contexts[layer])
            if channels_of:
                x = channels_of(block.normalise_ffn_input(post_attention))
                total_I += x.abs().sum((0, 1), dtype=torch.float64).cpu()
            hidden[batch] = block.feed(post_attention)
            report(layer * len(hidden) + batch + 1, parent.shape.layers * len(hidden))
        if not channels_of:
            continue
        norms_I = getattr(block.ffn_subblock, down).weight.double().norm(dim=0).cpu()
        contribution_I = (total_I / ids_NT.numel() * norms_I).float()
        if not torch.isfinite(contribution_I).all():
            raise NonFiniteError(f"channel contributions of layer {layer} are not finite: is the parent damaged?")
        contributions[f"layer.{layer}"] = contribution_I
    save_file(contributions, out_dir / "contributions.safetensors")
    return ImportanceRecord(layers=parent.shape.layers, tokens=ids_NT.numel())


def without(subblock: nn.Module, projection: str) -> nn.Module:
    """The same subblock, which stays as it is, without one of its projections: what enters it comes out."""
    changed = copy.copy(subblock)
    changed._modules = {**subblock._modules, projection: nn.Identity()}
    return changed


def load_contribution(directory: Path, layer: int) -> torch.Tensor:
    """Read the channel contributions of one layer, float32 (I,)."""
    return load_file(directory / "contributions.safetensors")[f"layer.{layer}"]
