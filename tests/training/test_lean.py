"""Norms, gated MLPs and attention against float64, with bounds; all of them, and checkpointing, in whole modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qalora.converters import load
from qalora.converters.decoder import decoder_of
from qalora.converters.torch_module import build
from qalora.testing import tiny_model
from qalora.training.lean import ATTENTION, _attention, _Gated, _Norm, checkpoint_layers, fit

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    """A mean of n squares has n roundings, its root half of them; what comes out is rounded once more."""
    rng, n, u = torch.Generator().manual_seed(0), 48, 2.0**-24
    x, grad = (torch.randn(5, n, generator=rng).to(dtype) for _ in range(2))
    weight, last = 1 + torch.rand(n, generator=rng), ROUNDED if dtype == torch.bfloat16 else u
    leaf = x.clone().requires_grad_()
    y = _Norm.apply(leaf, weight, 1e-5)
    (found,) = torch.autograd.grad(y, leaf, grad)
    assert y.dtype == found.dtype == dtype

    wide, scaled = x.double(), grad.double() * weight.double()
    root = (wide.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    wanted = weight.double() * wide * root
    assert bool(((y.double() - wanted).abs() <= 1.1 * (n / 2 + 5) * u * wanted.abs() + last * wanted.abs()).all())
    parts = scaled * root, wide * root**3 * (scaled * wide).mean(dim=-1, keepdim=True)
    exact = parts[0] - parts[1]
    sizes = parts[0].abs(), wide.abs() * root**3 * (scaled * wide).abs().mean(dim=-1, keepdim=True)
    slack = (n / 2 + 6) * u * sizes[0] + (n + 3 * (n / 2 + 4) + 6) * u * sizes[1]
    assert bool(((found.double() - exact).abs() <= 1.1 * (slack + last * exact.abs())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated(dtype: torch.dtype) -> None:
    """act and each product are rounded: four times at most, and sixteen for what exp and its quotient lose."""
    rng = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(5, 48, generator=rng).to(dtype) for _ in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = _Gated.apply(*leaves, nn.SiLU())
    found = torch.autograd.grad(y, leaves, grad)
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    wanted = nn.functional.silu(wide[0]) * wide[1]
    exact = torch.autograd.grad(wanted, wide, grad.double())
    u = 4 * ROUNDED + 16 * 2.0**-24 if dtype == torch.bfloat16 else 20 * 2.0**-24
    sizes = (gate * up).double().abs(), (grad * up).double().abs(), (grad * gate).double().abs()
    for got, right, size in zip((y, *found), (wanted, *exact), sizes, strict=True):
        assert got.dtype == dtype
        assert bool(((got.double() - right.detach()).abs() <= u * (1 + ROUNDED) * 1.1 * size).all())  # |silu'| <= 1.1


def hidden(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The last hidden state of a few tokens, and the gradient of its sum at the embedding."""
    embedded = module.model.embed_tokens(torch.arange(48).view(2, 24) * 5).to(dtype).detach().requires_grad_()
    out = module.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    (grad,) = torch.autograd.grad(out.float().square().sum(), embedded)
    return out.detach(), grad


@pytest.fixture(params=["tiny_untied", "gemma"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama, and a Gemma 3: four norms a layer, and of queries and keys, all of 1 + weight."""
    if request.param == "gemma":
        return tiny_model(tmp_path / "gemma", "gemma3_text")
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def module(tiny_untied: Path) -> Any:
    return made_for(tiny_untied, torch.bfloat16)


def made_for(place: Path, dtype: torch.dtype) -> Any:
    """A float module, made for training steps; its linear layers multiply in the dtype of what they are given."""
    model = load(place)
    built = build(model)
    fit(built, decoder_of(model.config, model.path), dtype)
    for part in built.model.modules():
        if isinstance(part, nn.Linear):
            part.forward = lambda x, part=part: nn.functional.linear(x, part.weight.to(x.dtype))  # type: ignore[method-assign]
    return built


def test_without_a_backward_nothing_is_another(place: Path) -> None:
    tokens = torch.arange(48).view(2, 24) * 5
    with torch.no_grad():
        found = made_for(place, torch.float32)(input_ids=tokens).logits
        assert torch.equal(found, build(load(place))(input_ids=tokens).logits)


def test_float32_goes_through_every_layer(place: Path) -> None:
    """Near what the plain module gives: two layers of some ten rounded steps, and of sums of 64 terms, in the norm."""
    found, plain = (hidden(module, torch.float32) for module in (made_for(place, torch.float32), build(load(place))))
    for got, wanted in zip(found, plain, strict=True):
        off = float((got.double() - wanted).norm())
        assert off <= 2 * (10 + 64) * 2.0**-24 * float(wanted.norm())
    assert not torch.equal(found[1], plain[1]), "else the parts were not replaced"


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
