"""The trained layer: the folded weight bit for bit, gradients against autograd, and nothing large kept."""

from typing import Any

import pytest
import torch
from torch import nn

from qalora.errors import AdapterError
from qalora.folding import fold_tensor
from qalora.tensor import GroupQuantTensor
from qalora.testing import random_tensor
from qalora.training.layer import FoldedLinear
from qalora.training.loss import IGNORED, summed_cross_entropy


def make(
    bits: int = 4, group_size: int = 32, pool_size: int = 32, minima: Any = "float16", zeros: str = "real"
) -> tuple[GroupQuantTensor, FoldedLinear]:
    tensor = random_tensor(48, 128, bits=bits, group_size=group_size, zeros=zeros)
    rng = torch.Generator().manual_seed(1)
    bias = torch.randn(48, generator=rng)
    layer = FoldedLinear(tensor, bias, name="w", rank=4, factor=0.7, pool_size=pool_size, minima=minima, rng=rng)
    with torch.no_grad():
        layer.b.copy_(torch.randn(layer.b.shape, generator=rng) * 0.05)
    return tensor, layer


@pytest.mark.parametrize("minima", ["float16", "float32"])
@pytest.mark.parametrize(("group_size", "pool_size"), [(32, 32), (16, 64), (64, 16), (128, 32)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_it_computes_with_the_folded_weight(bits: int, group_size: int, pool_size: int, minima: Any) -> None:
    tensor, layer = make(bits, group_size, pool_size, minima)
    folded = fold_tensor(tensor, layer.adapter_layer(), minima)
    assert torch.equal(layer.weight(), folded.dequantize())
    x = torch.randn(3, 5, 128)
    assert torch.equal(layer(x), nn.functional.linear(x, folded.dequantize(), layer.bias))


@pytest.mark.parametrize(("group_size", "pool_size"), [(32, 32), (16, 64), (64, 16)])
def test_gradients_pass_straight_through_the_rounding(group_size: int, pool_size: int) -> None:
    """Against autograd through scale * codes + min + factor * (B @ A) spread over the columns, with W' in its place."""
    _, layer = make(group_size=group_size, pool_size=pool_size)
    x = torch.randn(2, 5, 128, requires_grad=True)
    grad = torch.randn(2, 5, 48)
    found = torch.autograd.grad(layer(x), (x, layer.a, layer.b), grad)

    a, b = (part.detach().double().requires_grad_() for part in (layer.a, layer.b))
    wide = x.detach().double().requires_grad_()
    change = (layer.factor * b @ a).repeat_interleave(pool_size, dim=1)
    weight = layer.weight().double() + change - change.detach()
    wanted = torch.autograd.grad(nn.functional.linear(wide, weight), (wide, a, b), grad.double())
    for got, right in zip(found, wanted, strict=True):
        # float32 sums of at most 480 terms (10 rows x 48, or 128 columns) in two products: 2 * 480 * 2^-24 of the sizes
        assert float((got.double() - right).abs().max()) <= 2 * 480 * 2.0**-24 * float(right.abs().max())


def test_the_backward_keeps_pooled_inputs_only() -> None:
    _, layer = make()
    sizes: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 5, 128, requires_grad=True))
    assert sorted(sizes) == sorted([(10, 4), (4, 4), (48, 4)])  # pool(x), A, B; no [48, 128], no [10, 128]


def test_the_base_stays_packed() -> None:
    _, layer = make()
    floats = [value.numel() for value in (*layer.parameters(), *layer.buffers()) if value.is_floating_point()]
    assert max(floats) < 48 * 128 // 8
    assert layer.packed.dtype == torch.uint8
    assert layer.packed.numel() == 48 * 128 // 2


@pytest.mark.parametrize("pool_size", [16, 48])
def test_a_layer_that_is_not_trained_is_the_base_s(pool_size: int) -> None:
    """Its minima are not rounded, and a pool for others does not have to fit it."""
    tensor = random_tensor(48, 128, bits=4, group_size=32, zeros="integer")
    rng = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"rank": 4, "factor": 1.0, "pool_size": pool_size, "minima": "float16"}
    layer = FoldedLinear(tensor, None, name="w", rng=rng, trained=False, **options)
    assert torch.equal(layer.weight(), tensor.dequantize())
    assert not torch.equal(tensor.min.half().float(), tensor.min)
    x = torch.randn(5, 128, generator=rng, requires_grad=True)
    kept: list[torch.Size] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = layer(x)
    assert not kept
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5, 48) @ tensor.dequantize())
    assert layer.a.grad is None


@pytest.mark.parametrize(("pool_size", "words"), [(48, "divisor of in = 128"), (1, "ordinary LoRA")])
def test_pools_that_cannot_be_folded(pool_size: int, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        make(pool_size=pool_size)


ROUNDED = 2.0**-8
"""bfloat16 has 8 bits: what rounding moves a number by, of itself, at most. A tenth more is for float32's errors."""


def test_the_loss_of_bfloat16() -> None:
    """Logits are off by the rounding of W and their own, and a loss by twice the largest error of its row."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=rng).bfloat16().requires_grad_()
    weight = torch.randn(500, 16, generator=rng)
    targets = torch.randint(0, 500, (300,), generator=rng)
    found = summed_cross_entropy(hidden, weight, targets)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ weight.double().t()
    wanted = nn.functional.cross_entropy(logits, targets, reduction="sum")
    off = 1.1 * ROUNDED * (wide.detach().abs() @ weight.double().abs().t() + logits.detach().abs())
    assert abs(float(found.detach()) - float(wanted.detach())) <= float(2 * off.amax(dim=1).sum())
    got, right = torch.autograd.grad(found, hidden)[0], torch.autograd.grad(wanted, wide)[0]
    share = torch.softmax(logits.detach(), dim=1)
    share_off = share * (torch.exp(2 * off.amax(dim=1, keepdim=True)) - 1)
    signs = (share - nn.functional.one_hot(targets, 500)).abs()
    slack = (share_off + 2 * ROUNDED * (signs + share_off)) @ weight.double().abs() + ROUNDED * right.abs()
    assert bool(((got.double() - right).abs() <= 1.1 * slack).all())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_loss_is_cross_entropy(softcap: float | None) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=rng, requires_grad=True)
    weight = torch.randn(500, 16, generator=rng)
    targets = torch.randint(0, 500, (300,), generator=rng)
    targets[::7] = IGNORED
    found = summed_cross_entropy(hidden, weight, targets, softcap)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ weight.double().t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    # logits are off by 16 * 2^-24 * |h| @ |w|, and 8 units of the cap where there is one; log-sums by as much, and by a
    # sum of 500 terms with an exp and a log of 4 units; a share of the softmax, of itself, by twice that
    unit = 2.0**-24
    off = 16 * unit * (wide.detach().abs() @ weight.double().abs().t()).amax(dim=1, keepdim=True)
    off += 0.0 if softcap is None else 8 * unit * softcap
    rows, counted = 2 * off + 508 * unit, targets != IGNORED
    assert abs(float(found.detach()) - float(wanted.detach())) <= float(rows[counted].sum())
    got, right = torch.autograd.grad(found, hidden)[0], torch.autograd.grad(wanted, wide)[0]
    assert bool((got[::7] == 0).all())
    share = torch.softmax(logits.detach(), dim=1)
    signs = (share - nn.functional.one_hot(targets.clamp(min=0), 500)).abs()
    # 1 - (z/cap)^2 moves by 2/cap times what z does; the product with W is a sum of 500 terms
    bend = 0.0 if softcap is None else 2 * off / softcap + 2 * unit
    slack = (share * 2 * rows + signs * (bend + 500 * unit)) @ weight.double().abs()
    assert bool(((got.double() - right).abs() <= slack)[counted].all())
