"""Attention in bfloat16 against float64, with bounds; norms, MLPs and checkpointing in whole modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qalora.converters import load
from qalora.converters.decoder import decoder_of
from qalora.converters.torch_module import build
from qalora.training.lean import ATTENTION, _attention, checkpoint_layers, fit

ROUNDED = 2.0**-8
"""What rounding to bfloat16 moves a number by, of itself, at most."""


def spread(values: Tensor, times: int) -> Tensor:
    return values.repeat_interleave(times, dim=1)


@pytest.mark.parametrize("window", [None, 7])
def test_attention(window: int | None) -> None:
    """Four heads over two keys: P, dP, dS and what comes out are rounded, each by 2^-8 at most; the rest is float32."""
    rng = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(2, heads, 20, 8, generator=rng).bfloat16() for heads in (4, 2, 2, 4))
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    mask = None if window is None else (seen & ~torch.ones_like(seen).tril(-window)).expand(2, 1, 20, 20)
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    out, _ = _attention(nn.Identity(), *leaves, mask, scaling=0.3)
    found = torch.autograd.grad(out.transpose(1, 2), leaves, grad)

    q, k, v, g = (part.double() for part in (query, spread(key, 2), spread(value, 2), grad))
    scores = (0.3 * q @ k.transpose(2, 3)).masked_fill(~(seen if mask is None else mask), -torch.inf)
    share, u = torch.softmax(scores, dim=-1), 1.1 * ROUNDED
    wanted = share @ v
    assert bool(((out.transpose(1, 2).double() - wanted).abs() <= u * (share @ v.abs() + wanted.abs())).all())

    grad_share = g @ v.transpose(2, 3)
    mean = (grad_share * share).sum(dim=-1, keepdim=True)
    grad_scores = share * (grad_share - mean) * 0.3
    size = (grad_share.abs() * share).sum(dim=-1, keepdim=True)
    off = u * 0.3 * share * (3 * grad_share.abs() + 4 * size)  # of P: u; of dP: u; of their mean: 2 u; of dS itself: u
    right = grad_scores @ k, grad_scores.transpose(2, 3) @ q, share.transpose(2, 3) @ g
    slack = off @ k.abs(), off.transpose(2, 3) @ q.abs(), u * share.transpose(2, 3) @ g.abs()
    for name, got, exact, most in zip("qkv", found, right, slack, strict=True):
        if name != "q":  # both queries of a key
            exact, most = (part.view(2, 2, 2, 20, 8).sum(dim=2) for part in (exact, most))
        assert bool(((got.double() - exact).abs() <= most + u * exact.abs() + u * most).all()), name


def hidden(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The last hidden state of a few tokens, and the gradient of its sum at the embedding."""
    embedded = module.model.embed_tokens(torch.arange(48).view(2, 24) * 5).to(dtype).detach().requires_grad_()
    out = module.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    (grad,) = torch.autograd.grad(out.float().square().sum(), embedded)
    return out.detach(), grad


@pytest.fixture
def module(tiny_untied: Path) -> Any:
    """A float module, made for bfloat16; its linear layers multiply in the dtype of what they are given."""
    model = load(tiny_untied)
    built = build(model)
    fit(built, decoder_of(model.config, model.path), torch.device("cpu"))
    for part in built.model.modules():
        if isinstance(part, nn.Linear):
            part.forward = lambda x, part=part: nn.functional.linear(x, part.weight.to(x.dtype))  # type: ignore[method-assign]
    return built


def test_float32_is_untouched(tiny_untied: Path, module: Any) -> None:
    for got, wanted in zip(hidden(module, torch.float32), hidden(build(load(tiny_untied)), torch.float32), strict=True):
        assert torch.equal(got, wanted)


def test_bfloat16_goes_through_every_layer(module: Any) -> None:
    """Hidden states and gradients stay bfloat16, and near: two layers of some ten rounded steps each, in the norm."""
    assert module.config._attn_implementation == ATTENTION
    for got, wanted in zip(hidden(module, torch.bfloat16), hidden(module, torch.float32), strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - wanted).norm()) <= 2 * 10 * ROUNDED * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(module: Any, dtype: torch.dtype) -> None:
    def kept() -> tuple[tuple[Tensor, Tensor], int]:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = hidden(module, dtype)
        return found, sum(sizes.values())

    plain, most = kept()
    checkpoint_layers(module)
    again, less = kept()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert less < most
