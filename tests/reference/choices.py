"""Log-likelihoods of choices from whole logits in float64: one forward pass of transformers' model for each choice."""

from typing import Any

import torch


def log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    """Nats that a model gives to a continuation of a context."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0].double().log_softmax(-1)
    total = 0.0
    for place, token in enumerate(continuation, start=len(context)):
        total += float(log_probabilities[place - 1, token])
    return total


def answers(likelihoods: list[float]) -> int:
    """The number of the largest one, the first of equal ones."""
    best = 0
    for number, value in enumerate(likelihoods):
        if value > likelihoods[best]:
            best = number
    return best
