"""Scores without the layers after the block: second-order estimates from gradients of the parent (METHOD section 4).

Labels y are drawn from the parent's own predictions. With g the gradient of sum_t log p(y_t) at a layer's output and d
the change that a block makes there, the mean of (sum_t g_t . d_t)^2 / 2T over drawn labels and windows of T tokens is
the KL in nats per token to second order in d, because the covariance of g is the Fisher information. The gradients
serve all blocks of all layers. A score then needs one forward pass of the block alone.

Large changes are underestimated: a KL saturates, and its second-order form does not see that.

Legend: N windows, B windows of a batch, S label samples, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import math
from pathlib import Path

import torch
from safetensors import safe_open

from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import Activations
from puzzle_core.model.predictions import chunks, log_probabilities
from puzzle_core.model.surgery import load_subblocks
from puzzle_core.model.tensor_stream import map_new_tensor
from puzzle_core.scoring import block_output
from puzzle_core.state_dict import State
from puzzle_core.work import GradientsRecord, GradientsWork, ScoreRecord, ScoreWork

GRADIENTS = "gradients"


def measure_gradients(work: GradientsWork, activations: Activations, out_dir: Path) -> GradientsRecord:
    """Write the gradients at the output of every layer, one file (N, S, T, D) per layer in the type of the activations.

    The parent runs layer by layer, from the last one to the second. Files are mapped, so memory holds a few windows.

    Args:
        activations: the parent's, captured through the last layer.

    Raises:
        NonFiniteError: a gradient is NaN or infinite; the message names the layer.
        StorageError: the disk has no room for the gradients.
    """
    shape, (windows, tokens) = activations.parent.shape, activations.ids_NT.shape
    size = (windows, work.samples, tokens, shape.hidden)
    leaving_NSTD: torch.Tensor | None = None
    for layer in reversed(range(shape.layers)):
        gradient_NSTD = map_new_tensor(_file(out_dir, layer), GRADIENTS, size, activations.dtype)
        if leaving_NSTD is None:
            _fill_at_last_output(gradient_NSTD, work, activations)
        else:
            _fill_through(layer + 1, gradient_NSTD, leaving_NSTD, activations)
        if not all(torch.isfinite(gradient_STD).all() for gradient_STD in gradient_NSTD):
            raise NonFiniteError(f"gradients at the output of layer {layer} are not finite: is the parent damaged?")
        leaving_NSTD = gradient_NSTD
    return GradientsRecord(layers=shape.layers, samples=work.samples, tokens=windows * tokens)


def uniform_draws(work: GradientsWork, windows: int, tokens: int) -> torch.Tensor:
    """The random numbers in [0, 1) that labels follow from, float32 (N, S, T): equal on every device."""
    generator = torch.Generator().manual_seed(work.seed)
    return torch.rand(windows, work.samples, tokens, generator=generator)


def _fill_at_last_output(gradient_NSTD: torch.Tensor, work: GradientsWork, activations: Activations) -> None:
    """Write the gradients at the output of the last layer, through norm and head."""
    outside, shape = activations.outside(), activations.parent.shape
    windows, tokens = activations.ids_NT.shape
    draws_NST = uniform_draws(work, windows, tokens)
    for window in range(windows):
        final_TD = activations.layer_input(shape.layers)[window].to(activations.device)
        for part in chunks(tokens, shape.vocabulary, activations.device):
            final_CD = final_TD[part].detach().requires_grad_()
            with torch.enable_grad():
                log_p_CV = log_probabilities(outside, outside.model.normalise(final_CD))
            labels_CS = _draw(log_p_CV.detach(), draws_NST[window, :, part].T.to(activations.device))
            for sample in range(work.samples):
                label_C1 = labels_CS[:, sample, None]
                (gradient_CD,) = torch.autograd.grad(
                    log_p_CV, final_CD, _one_hot(log_p_CV, label_C1), retain_graph=sample + 1 < work.samples
                )
                gradient_NSTD[window, sample, part] = gradient_CD.cpu()


def _draw(log_p_CV: torch.Tensor, draws_CS: torch.Tensor) -> torch.Tensor:
    """Labels (C, S): where the running sum of probabilities passes the draws."""
    sums_CV = log_p_CV.exp().cumsum(-1)
    labels_CS = torch.searchsorted(sums_CV, (draws_CS * sums_CV[:, -1:]).contiguous(), right=True)
    return labels_CS.clamp(max=log_p_CV.shape[-1] - 1)


def _one_hot(like_CV: torch.Tensor, label_C1: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_CV).scatter_(-1, label_C1, 1.0)


def _fill_through(
    layer: int, entering_NSTD: torch.Tensor, leaving_NSTD: torch.Tensor, activations: Activations
) -> None:
    """Write the gradients at a layer's input, from those at its output."""
    block, layer_input = activations.block(layer), activations.layer_input(layer)
    samples = leaving_NSTD.shape[1]
    for rows in activations.batches():
        input_BTD = layer_input[rows].to(activations.device).detach().requires_grad_()
        with torch.enable_grad():
            output_BTD = block(input_BTD, **activations.contexts(rows)[layer])
        for sample in range(samples):
            leaving_BTD = leaving_NSTD[rows, sample].to(activations.device)
            (entering_BTD,) = torch.autograd.grad(output_BTD, input_BTD, leaving_BTD, retain_graph=sample + 1 < samples)
            entering_NSTD[rows, sample] = entering_BTD.cpu()


@torch.no_grad()
def estimate_score(
    work: ScoreWork, activations: Activations, weights: dict[str, State], gradients_dir: Path
) -> ScoreRecord:
    """Estimate the KL of one block variant; the loss and the agreement are not estimated.

    Args:
        activations: the parent's, captured through the layer.
        weights: trained weights by the id of a variant or option.
        gradients_dir: the artifact of `measure_gradients` on the same tokens.

    Raises:
        NonFiniteError: the estimate is NaN or infinite; the message names the layer and the block.
    """
    block = load_subblocks(activations.parent, work.layer, work.option, weights, activations.dtype, activations.device)
    leaving = work.layer + work.span
    output, total = activations.layer_input(leaving), 0.0
    with safe_open(_file(gradients_dir, leaving - 1), framework="pt") as file:
        gradients = file.get_slice(GRADIENTS)
        for rows in activations.batches():
            changed_BTD = block_output(work, activations, block, rows).float()
            change_BTD = changed_BTD - output[rows].to(activations.device).float()
            gradient_BSTD = gradients[rows].to(activations.device).float()
            effect_BS = torch.einsum("bstd,btd->bs", gradient_BSTD, change_BTD).double()
            total += effect_BS.square().mean(1).sum().item()
    kl = total / (2 * activations.ids_NT.numel())
    if not math.isfinite(kl):
        raise NonFiniteError(f"the estimated score of layer {work.layer} {work.block} is not finite ({kl})")
    return ScoreRecord(
        layer=work.layer,
        block=work.block,
        span=work.span,
        kl_nats_per_token=kl,
        tokens=activations.ids_NT.numel(),
        method="fisher",
    )


def _file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:03d}.safetensors"
