"""Products of training steps against the folded weights, with derived bounds; what they keep, and what they share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qalora.checkpoint import Checkpoint
from qalora.folding import fold_tensor
from qalora.parity.noise import NOISE_FACTOR, NOISE_FLOOR
from qalora.tensor import GroupQuantTensor
from qalora.testing import random_tensor
from qalora.training import TrainOptions
from qalora.training import layer as layers
from qalora.training.fast import SharedInput, refresh, share_inputs
from qalora.training.layer import FoldedLinear
from qalora.training.loop import _Run
from qalora.training.plan import data_of, targets_of
from qalora.training.state import State

OUTS = {"q_proj": 48, "k_proj": 16, "v_proj": 16}
ROUNDED = 2.0**-8
"""bfloat16 has 8 bits: what rounding moves a number by, of itself, at most. A tenth more is for float32's errors."""


def made(
    dtype: torch.dtype,
    bits: int = 4,
    group_size: int = 32,
    pool_size: int = 32,
    keep: bool = True,
    **options: Any,
) -> tuple[dict[str, GroupQuantTensor], dict[str, FoldedLinear], list[SharedInput]]:
    """q, k and v of 128 columns, with biases."""
    rng = torch.Generator().manual_seed(1)
    tensors, modules = {}, {}
    for seed, (name, out) in enumerate(OUTS.items()):
        tensors[name] = random_tensor(out, 128, bits=bits, group_size=group_size, seed=seed)
        modules[name] = FoldedLinear(
            tensors[name],
            torch.randn(out, generator=rng),
            name=name,
            rank=4,
            factor=0.7,
            pool_size=pool_size,
            minima="float16",
            rng=rng,
            **options,
        )
        modules[name].b.data = torch.randn(modules[name].b.shape, generator=rng) * 0.05
    shared = share_inputs(((f"layer.{name}", module) for name, module in modules.items()), dtype, keep=keep)
    refresh(shared)
    return tensors, modules, shared


def folded_of(tensor: GroupQuantTensor, module: FoldedLinear) -> GroupQuantTensor:
    return fold_tensor(tensor, module.adapter_layer(), "float16") if module.trained else tensor


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("group_size", "pool_size"), [(32, 32), (16, 64), (64, 16)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_near_the_folded_weight_s(
    bits: int, group_size: int, pool_size: int, keep: bool, dtype: torch.dtype
) -> None:
    """Against W' in float64.

    bfloat16: W, min' - min, pool(x) and what comes out are rounded, each by u = 2^-8 at most.
    float32: the same with u = 2^-24, and sums of 128 + 8 terms with as many roundings.
    """
    tensors, modules, _ = made(dtype, bits, group_size, pool_size, keep)
    u, terms = (ROUNDED, 0) if dtype == torch.bfloat16 else (2.0**-24, 128 + 8)
    x = torch.randn(2, 5, 128).to(dtype).requires_grad_()
    wide = x.detach().double()
    right_x, size_x = torch.zeros(2, 5, 128, dtype=torch.float64), torch.zeros(2, 5, 128, dtype=torch.float64)
    outputs = [modules[name](x) for name in OUTS]
    grads = [torch.randn(y.shape).to(dtype) for y in outputs]
    parameters = [part for module in modules.values() for part in (module.a, module.b)]
    found_x, *found = torch.autograd.grad(outputs, (x, *parameters), grads)
    for n, (name, module) in enumerate(modules.items()):
        folded = folded_of(tensors[name], module)
        size, right, y, grad = folded.group_size, folded.dequantize().double(), outputs[n], grads[n]
        assert y.dtype == dtype
        assert module.bias is not None
        bias = module.bias.detach().double()
        scale, minimum = tensors[name].scale.double(), tensors[name].min.double()
        base = (scale.abs().repeat_interleave(group_size, dim=1) * tensors[name].codes()).abs()
        base += minimum.abs().repeat_interleave(group_size, dim=1)
        change = (folded.min.double() - tensors[name].regrouped(size).min.double()).abs()
        pooled = wide.abs().view(2, 5, -1, size).sum(dim=3)
        inner = (2 + terms) * u * (wide.abs() @ base.t()) + (2 + terms + u) * u * (pooled @ change.t())
        wanted = wide @ right.t() + bias
        assert bool(((y.double() - wanted).abs() <= 1.1 * (inner + 2 * u * (bias.abs() + inner + wanted.abs()))).all())
        right_x += grad.double() @ right
        size_x += grad.double().abs() @ (base + change.repeat_interleave(size, dim=1))
        # grad_A, grad_B: float32 sums, at most 480 terms in two of them; pool(x) and grad_M are rounded before
        a, b = module.a.detach().double(), module.b.detach().double()
        rows = wide.view(10, -1, pool_size).sum(dim=2)
        grad_m = module.factor * grad.double().view(10, -1).t() @ rows
        sizes = module.factor * grad.double().abs().view(10, -1).t() @ wide.abs().view(10, -1, pool_size).sum(dim=2)
        off = 1.1 * (2 * u if dtype == torch.bfloat16 else 0) * sizes
        slack = b.abs().t() @ off, off @ a.abs().t()
        for got, exact, most in zip(found[2 * n : 2 * n + 2], (b.t() @ grad_m, grad_m @ a.t()), slack, strict=True):
            assert got.dtype == torch.float32
            rounding = 2 * 480 * 2.0**-24 * float(exact.abs().max())
            assert bool(((got.double() - exact).abs() <= most + rounding).all())
    # both parts of the weight, both products, their sum and those of three layers are rounded
    assert bool(((found_x.double() - right_x).abs() <= 1.1 * (6 + terms) * u * size_x).all())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("group_size", "pool_size"), [(32, 32), (16, 64), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_follow_the_folded_minima(group_size: int, pool_size: int, trained: bool, dtype: torch.dtype) -> None:
    """Kept or made anew, they are the base and the change of the shipped minima, each rounded, after every refresh."""
    runs = [made(dtype, 4, group_size, pool_size, keep, trained=trained) for keep in (True, False)]
    for _ in range(3):
        for tensors, modules, shared in runs:
            refresh(shared)
            folded = {name: folded_of(tensors[name], module) for name, module in modules.items()}
            base = torch.cat([tensors[name].dequantize() for name in OUTS]).to(dtype)
            changes = [one.min - tensors[name].regrouped(one.group_size).min for name, one in folded.items()]
            change = torch.cat(changes).to(dtype)
            for _ in range(2):
                weight = shared[0].weight()
                assert torch.equal(weight[:, :128], base)
                if trained:
                    assert torch.equal(weight[:, 128 : 128 + change.shape[1]], change)
                    assert dtype == torch.float32 or weight.shape[1] % 32 == 0
                    assert not bool(weight[:, 128 + change.shape[1] :].any())
                else:
                    assert weight.shape[1] == 128
            optimizer = torch.optim.AdamW([part for one in modules.values() for part in (one.a, one.b)], lr=0.01)
            for module in modules.values():
                module.a.grad, module.b.grad = torch.ones_like(module.a), torch.ones_like(module.b)
            optimizer.step()


def test_layers_that_differ_are_not_one_product() -> None:
    """Another group or bias, not trained, another module, and o_proj, which has another input."""
    rng = torch.Generator().manual_seed(0)

    def linear(group_size: int = 32, bias: bool = False, trained: bool = True, pool_size: int = 32) -> FoldedLinear:
        tensor = random_tensor(16, 128, bits=4, group_size=group_size)
        options: dict[str, Any] = {"name": "w", "rank": 2, "factor": 1.0, "minima": "float16", "trained": trained}
        return FoldedLinear(tensor, torch.zeros(16) if bias else None, pool_size=pool_size, rng=rng, **options)

    given = {"0.q_proj": linear(), "0.k_proj": linear(), "0.v_proj": linear(bias=True), "0.o_proj": linear()}
    given |= {"1.q_proj": linear(64, pool_size=64), "1.k_proj": linear(trained=False), "1.v_proj": linear()}
    given |= {"2.gate_proj": linear(), "2.up_proj": linear(), "2.down_proj": linear()}
    shared = share_inputs(given.items(), torch.float32, keep=False)
    names = {layer: name for name, layer in given.items()}
    found = [[names[layer] for layer in one.layers] for one in shared]
    assert [one for one in found if len(one) > 1] == [["0.q_proj", "0.k_proj"], ["2.gate_proj", "2.up_proj"]]
    assert sum(map(len, found)) == len(given)


def test_an_input_is_multiplied_once() -> None:
    """q, k and v of one input lie in one piece of memory; of another input, or twice, they are computed anew."""
    _, modules, _ = made(torch.float32)
    q, k, v = modules.values()
    x, other = torch.randn(3, 128), torch.randn(3, 128)
    first, second = q(x), k(x)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert torch.equal(v(other), made(torch.float32)[1]["v_proj"](other))
    assert torch.equal(q(other), made(torch.float32)[1]["q_proj"](other))
    assert torch.equal(q(other), q(other))
    with torch.no_grad():
        exact = nn.functional.linear(other, q.weight(), q.bias)
        assert torch.equal(q(other), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_pooled_inputs_only(dtype: torch.dtype) -> None:
    _, modules, _ = made(dtype)
    sizes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        modules["q_proj"](torch.randn(2, 5, 128).to(dtype).requires_grad_())
    assert sorted(sizes) == sorted([(10, 4), *[(4, 4)] * 3, *[(out, 4) for out in OUTS.values()]])  # pool(x), A, B


EXACT = layers._Folded


class _OtherOrder(EXACT):
    """The exact forward, whose sums have another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: FoldedLinear) -> Tensor:
        EXACT.forward(ctx, x, a, b, layer)
        order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(0))
        return nn.functional.linear(x[..., order], layer.weight()[:, order], layer.bias)


def losses(base: Checkpoint, text: Path, out: Path, weights: Any) -> tuple[Tensor, Tensor]:
    """The loss of each step, and held-out losses."""
    chosen = TrainOptions(
        data=str(text), out=out, max_steps=24, rank=4, evaluate_every=6, max_length=32, weights=weights
    )
    run = _Run(base, chosen, targets_of(base, chosen), *data_of(base, chosen))
    state = State()
    run.to_the_end(state, lambda report: None)
    held_out = [loss for _, loss in state.held_out]
    return torch.tensor(state.losses, dtype=torch.float64), torch.tensor(held_out, dtype=torch.float64)


def test_loss_curves_are_those_of_the_exact_forward(
    base: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what the exact forward's move by when its sums have another order, as `qalora.parity.noise` judges logits."""
    fast = losses(base, text, tmp_path / "fast", "kept")
    exact = losses(base, text, tmp_path / "exact", "packed")
    monkeypatch.setattr(layers, "_Folded", _OtherOrder)
    other = losses(base, text, tmp_path / "other", "packed")
    for got, wanted, moved in zip(fast, exact, other, strict=True):
        noise = float((moved - wanted).abs().max())
        assert float((got - wanted).abs().max()) <= max(NOISE_FACTOR * noise, NOISE_FLOOR * float(wanted.max()))
    assert not torch.equal(fast[0], exact[0])  # held-out losses may be: minima are rounded
    assert not torch.equal(other[0], exact[0])
