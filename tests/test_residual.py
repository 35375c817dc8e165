"""Integer zero points and what is left over give the weights back."""

from dataclasses import replace

import pytest
import torch

from qalora.residual import from_residual, to_residual
from qalora.tensor import BITS
from qalora.testing import random_tensor


@pytest.mark.parametrize("zeros", ["nearest", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_the_minimum_comes_back(bits: int, zeros: str) -> None:
    tensor = random_tensor(8, 128, bits=bits, group_size=32)
    residual = to_residual(tensor, zeros)  # type: ignore[arg-type]
    assert residual.exact  # float16 scale and min of similar size: 24 bits hold the sum
    assert torch.equal(from_residual(tensor.scale, residual.zero, residual.c), tensor.min)
    weight = (
        tensor.scale[..., None] * (tensor.codes().view(8, 4, 32).double() - residual.zero[..., None].double())
        + residual.c[..., None]
    )
    assert torch.equal(weight.view(8, 128).float(), tensor.dequantize())


def test_nearest_zeros_leave_at_most_half_a_step() -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=32)
    residual = to_residual(tensor, "nearest")
    inside = (-tensor.min >= 0) & (tensor.scale > 0) & (-tensor.min <= 15 * tensor.scale)
    assert inside.any()
    assert (residual.c.abs() <= tensor.scale / 2)[inside].all()


def test_a_constant_group_is_all_residual() -> None:
    tensor = random_tensor(3, 64, bits=4, group_size=32)
    residual = to_residual(tensor, "nearest")
    assert torch.equal(residual.c[0], tensor.min[0])
    assert (residual.zero[0] == 8).all()


def test_a_rounded_residual_says_so() -> None:
    tensor = random_tensor(3, 64, bits=4, group_size=32)
    far = replace(tensor, min=torch.full_like(tensor.min, 8.0), scale=torch.full_like(tensor.scale, 2.0**-24))
    assert not to_residual(far, "symmetric").exact  # 8 + 8 * 2**-24: float32 has a step of 2**-20 there
