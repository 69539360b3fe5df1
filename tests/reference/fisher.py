"""Gradients and second-order KL of transformers' own model, by autograd through all of it, window by window."""

from collections.abc import Iterator
from typing import Any

import torch


def states_and_log_p(model: Any, ids_1T: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves a layer, and the log-probabilities (1, T, V) that follow from it."""
    kept = []
    hook = model.model.layers[layer].register_forward_hook(lambda *call: kept.append(call[-1]))
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)  # so that the states have a graph
    try:
        log_p = model(input_ids=ids_1T).logits.log_softmax(-1)
    finally:
        hook.remove()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return output, log_p


def gradients(model: Any, ids_NT: torch.Tensor, draws_NST: torch.Tensor, layer: int) -> Iterator[torch.Tensor]:
    """By window, the gradients (S, T, D) at a layer's output of the log-probability of labels that follow the draws."""
    for ids_T, draws_ST in zip(ids_NT, draws_NST, strict=True):
        output, log_p = states_and_log_p(model, ids_T[None].long(), layer)
        found = []
        for draws_T in draws_ST:
            total = torch.zeros(())
            for token, draw in enumerate(draws_T):
                passed = log_p[0, token].detach().exp().cumsum(0) > draw
                total = total + log_p[0, token, int(passed.nonzero()[0])]
            found.append(torch.autograd.grad(total, output, retain_graph=True)[0].reshape(len(ids_T), -1))
        yield torch.stack(found)


def second_order_kl(model: Any, ids_NT: torch.Tensor, layer: int, change_NTD: torch.Tensor) -> float:
    """Half the variance of the logits' change under the parent's predictions, in nats per token: exact, no draws."""
    total = 0.0
    for ids_T, change_TD in zip(ids_NT, change_NTD, strict=True):
        output, log_p = states_and_log_p(model, ids_T[None].long(), layer)
        weight = torch.zeros_like(log_p, requires_grad=True)
        (pulled,) = torch.autograd.grad(log_p, output, weight, create_graph=True)
        (moved_1TV,) = torch.autograd.grad(pulled, weight, change_TD.view_as(output))
        p = log_p.detach().exp()
        mean = (p * moved_1TV).sum(-1, keepdim=True)
        total += 0.5 * float((p * (moved_1TV - mean) ** 2).sum())
    return total / ids_NT.numel()
