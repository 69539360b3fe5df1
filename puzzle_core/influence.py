"""How much layers of a parent change the hidden state: block influence, for depth pruning (METHOD section 6).

The influence of layers i to j-1 is 1 - cos(h_i, h_j), the mean over tokens, where h_i enters layer i (ShortGPT, arXiv
2403.03853, for single layers; Gromov et al., arXiv 2403.17887, for runs of layers).

Legend: L layers, N windows, B windows of a batch, T tokens, D hidden width.
"""

import math

import torch

from puzzle_core.distill.losses import cosine_distance
from puzzle_core.errors import NonFiniteError
from puzzle_core.model.activations import Activations
from puzzle_core.work import InfluenceRecord, InfluenceWork


@torch.no_grad()
def measure_influence(work: InfluenceWork, activations: Activations) -> InfluenceRecord:
    """Measure the influence of every run of layers.

    Args:
        activations: the parent's, captured through the last layer.

    Raises:
        NonFiniteError: an influence is NaN or infinite; the message names the layers.
    """
    layers, tokens = activations.parent.shape.layers, activations.ids_NT.numel()
    sums = [[0.0] * (layers - first) for first in range(layers)]
    states = [activations.layer_input(layer) for layer in range(layers + 1)]
    for rows in activations.batches():
        hidden = [state_NTD[rows].to(activations.device).float() for state_NTD in states]
        share = hidden[0].shape[0] * hidden[0].shape[1] / tokens
        for first in range(layers):
            for last in range(first, layers):
                distance = cosine_distance(hidden[first], hidden[last + 1]).item()
                if not math.isfinite(distance):
                    raise NonFiniteError(
                        f"the influence of layers {first} to {last} is {distance}: is the parent damaged?"
                    )
                sums[first][last - first] += share * distance
    return InfluenceRecord(influence=tuple(map(tuple, sums)), tokens=tokens)
