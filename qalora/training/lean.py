"""Parts of a transformers decoder that run faster, and keep less for the backward, in a training step.

`fit` puts them into a module that `qalora.converters.torch_module.build` made. They take effect where a backward
follows, in float32 and in bfloat16; without one the module computes what it did before, bit for bit, and that is how it
is evaluated.

norms        y = w * x * r with r = 1 / sqrt(mean(x^2) + epsilon), in float32; x and r are kept
                 grad_x = r * w * g - x * r^3 * mean(w * g * x)
             what comes out has the dtype of x: transformers would give float32, as the weight is
gated MLPs   act(gate) * up: gate and up alone are kept
attention    with bfloat16 on a CPU, where torch's fused kernel takes four times as long at 128 tokens:
                 P = softmax(scale * Q K^T)     O = P V       scores and softmax in float32, P kept in bfloat16
                 dV = P^T dO    dS = P * (dP - rowsum(P * dP))  with dP = dO V^T    dQ = scale dS K    dK = scale dS^T Q
             up to `LONGEST` tokens, from where on P takes too much; queries that share a key are rows of one product
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qalora.converters.decoder import Decoder

__all__ = ["checkpoint_layers", "fit"]

ATTENTION = "qalora_training"
"""The name under which transformers knows this module's attention."""

LONGEST = 512
"""Tokens of a sequence up to which P is kept: batch * heads * tokens^2 * 2 bytes a layer."""


def fit(module: Any, decoder: Decoder, dtype: torch.dtype) -> None:
    """Replace the parts of a module, whose parameters are float32, for training steps in a dtype."""
    device = module.model.norm.weight.device
    offset = 1.0 if decoder.family.norm_offset else 0.0
    for layer in module.model.layers:
        for name, _ in decoder.family.norms:
            _replace_forward(layer.get_submodule(name), _norm, decoder.epsilon, offset)
        if all(hasattr(getattr(layer, "mlp", None), part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            _replace_forward(layer.mlp, _gated_mlp)
    _replace_forward(module.model.norm, _norm, decoder.epsilon, offset)
    if dtype == torch.bfloat16 and device.type == "cpu" and decoder.softcap is None:
        _register_attention()
        module.config._attn_implementation = ATTENTION


def checkpoint_layers(module: Any) -> None:
    """Keep what goes into each decoder layer, and compute the layer again in the backward."""
    for layer in module.model.layers:
        _replace_forward(layer, _again)


def _replace_forward(part: nn.Module, by: Callable[..., Any], *settings: float) -> None:
    """`by` is called with the module, its forward so far, settings, and its arguments."""
    part.forward = partial(by, part, part.forward, *settings)


def _again(part: nn.Module, forward: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **settings)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **settings)


def _norm(part: Any, forward: Callable[[Tensor], Tensor], epsilon: float, offset: float, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    y: Tensor = _Norm.apply(x, part.weight + offset, epsilon)  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    """The formulas of the module, over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        root = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (wide * root).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, root = ctx.saved_tensors
        wide, scaled = x.float(), grads[0].float() * weight
        mean = (scaled * wide).mean(dim=-1, keepdim=True).mul_(root.pow(3))
        return scaled.mul_(root).addcmul_(wide, mean, value=-1.0).to(x.dtype), None, None


def _gated_mlp(part: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    hidden: Tensor = _Gated.apply(part.gate_proj(x), part.up_proj(x), part.act_fn)  # type: ignore[no-untyped-call]
    output: Tensor = part.down_proj(hidden)
    return output


class _Gated(torch.autograd.Function):
    """act(gate) * up, of which gate and up alone are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            bent = ctx.act(gate)
        (grad_gate,) = torch.autograd.grad(bent, gate, grads[0] * up)
        return grad_gate, bent.detach() * grads[0], None


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' protocol: [batch, heads, tokens, size] and a mask of what is seen, or None for all that was before.

    Gives [batch, tokens, heads, size].
    """
    tokens = query.shape[2]
    if (
        query.dtype == torch.float32
        or not torch.is_grad_enabled()
        or tokens > LONGEST
        or value.shape[3] != query.shape[3]
    ):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    bias = torch.zeros(attention_mask.shape, device=query.device).masked_fill_(~attention_mask, -torch.inf)
    scale = settings.get("scaling") or query.shape[3] ** -0.5
    out: Tensor = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """The formulas of the module; `hidden` is 0 or -Inf, [batch or 1, 1, tokens, tokens]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, size = query.shape
        key_heads = key.shape[1]
        rows = query.reshape(batch, key_heads, -1, size)  # the queries of a key's heads, one after the other
        scores = (rows.float() @ key.float().transpose(2, 3)).view(batch, key_heads, -1, tokens, tokens)
        scores.mul_(scale).add_(bias.unsqueeze(2))
        share = torch.softmax(scores, dim=-1).to(query.dtype).view(batch, key_heads, -1, tokens)
        ctx.save_for_backward(rows, key, value, share)
        ctx.scale = scale
        return (share @ value).view(batch, heads, tokens, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, key, value, share = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        grad_value = share.transpose(2, 3) @ grad
        grad_share = (grad @ value.transpose(2, 3)).float()
        wide = share.float()
        scores = grad_share.sub_((grad_share * wide).sum(dim=-1, keepdim=True)).mul_(wide).mul_(ctx.scale)
        grad_scores = scores.to(rows.dtype)
        grad_query = (grad_scores @ key).view(grads[0].shape)
        return grad_query, grad_scores.transpose(2, 3) @ rows, grad_value, None, None
