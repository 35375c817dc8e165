"""Cross entropy over a large vocabulary without the whole logits: a few rows at a time, with the gradient at once.

    loss = sum over rows with target >= 0 of  logsumexp(h @ W^T) - (h @ W^T)[target]
    grad_h = (softmax(h @ W^T) - onehot(target)) @ W

Where a family caps its logits, z = cap * tanh(h @ W^T / cap) takes the place of h @ W^T, and each term of the
gradient's sum over the vocabulary is multiplied with 1 - (z / cap)^2. W is frozen, so that h alone has a gradient; it
is computed in the forward, and no logits are kept. With a bfloat16 h, W is rounded to bfloat16 for the two products;
logits, softmax and loss are float32 from there on, and the softmax is rounded again for the second product. Its sum
divides what comes out of that product, which is smaller.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "summed_cross_entropy"]

IGNORED = -100
"""A target that does not count."""

ROWS = {torch.float32: 128, torch.bfloat16: 256}
"""Rows whose product is held at a time: 25 MB at a vocabulary of 49,152. Fewer cost: W is read again for each part."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """The sum (not the mean) over targets, in nats.

    hidden   float32 or bfloat16 [rows, hidden size]
    weight   float32 or as hidden [vocabulary, hidden size], frozen
    targets  int64 [rows], IGNORED where a row does not count
    softcap  what caps the logits, if something does
    """
    loss: Tensor = _Chunked.apply(hidden, weight, targets, softcap)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        learned_rows = (targets != IGNORED).nonzero()[:, 0]
        grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight, most = weight.to(hidden.dtype), ROWS[hidden.dtype]
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        products = hidden.new_empty(min(most, len(learned_rows)), weight.shape[0])  # one piece of memory for every part
        wide = products if hidden.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        for rows in torch.split(learned_rows, most):
            product = torch.mm(hidden[rows], weight.t(), out=products[: len(rows)])
            logits = product if wide is products else wide[: len(rows)].copy_(product)
            slope = None
            if softcap is not None:
                bent = logits.div_(softcap).tanh_()
                slope = 1 - bent.square()
                logits = bent.mul_(softcap)
            target = targets[rows].unsqueeze(1)
            largest, target_logit = logits.amax(dim=1, keepdim=True), logits.gather(1, target)
            share = logits.sub_(largest).exp_()
            total = share.sum(dim=1, keepdim=True)
            loss += (largest + total.log() - target_logit).sum(dtype=torch.float64)
            if grad is not None:
                share.scatter_add_(1, target, -total)
                if slope is not None:
                    share.mul_(slope)
                parts = share if wide is products else product.copy_(share)
                grad[rows] = ((parts @ weight) / total).to(grad.dtype)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None
