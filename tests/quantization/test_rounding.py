"""Rounding against a slow loop, and the hard groups."""

from fractions import Fraction

import pytest
import torch

from qalora.errors import InputError
from qalora.quantization import ZEROS, quantize_tensor
from qalora.quantization.rounding import spec_of
from qalora.tensor import BITS, holds_float16, integer_zeros


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_the_spec_is_kept_and_no_better_code_exists(bits: int, group_size: int, zeros: str) -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(bits)) * 0.1
    tensor = quantize_tensor(weight, bits=bits, group_size=group_size, zeros=zeros)
    spec = spec_of(bits, group_size, zeros)
    assert holds_float16(tensor.scale)
    assert spec.min_dtype == torch.float32 or holds_float16(tensor.min)
    assert (integer_zeros(tensor) is not None) == (spec.zeros == "integer")
    codes = tensor.codes()
    for o in range(6):
        for i in range(0, 256, 37):
            at = (o, i // group_size)
            scale, minimum = Fraction(float(tensor.scale[at])), Fraction(float(tensor.min[at]))
            target = Fraction(float(weight[o, i]))
            errors = [abs(scale * code + minimum - target) for code in range(1 << bits)]
            # float32 arithmetic may take the wrong side of a tie, by a few float32 ULP of a step
            assert errors[int(codes[o, i])] - min(errors) <= abs(scale) * Fraction(1, 1 << 16)


def test_the_range_is_used() -> None:
    weight = torch.linspace(-1, 1, 64)[None].repeat(2, 1)
    for bits in BITS:
        codes = quantize_tensor(weight, bits=bits, group_size=64).codes()
        assert int(codes.min()) == 0
        assert int(codes.max()) == (1 << bits) - 1
        assert len(codes[0].unique()) == min(1 << bits, 64)


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", BITS)
def test_hard_groups(bits: int, zeros: str) -> None:
    weight = torch.zeros(5, 32)
    weight[1] = 0.75
    weight[2] = -3e-9
    weight[3, ::2] = 1e-9
    weight[4, 0] = 2.0**-24
    tensor = quantize_tensor(weight, bits=bits, group_size=32, zeros=zeros)
    got = tensor.dequantize()
    assert torch.equal(got[0], torch.zeros(32))
    assert torch.isfinite(got).all()
    if zeros == "real":
        assert torch.equal(got[1], weight[1])
    # below float16's smallest step, 2**-24, every weight is within that step
    assert (got[2:] - weight[2:]).abs().max() <= 2.0**-24


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers_are_refused(bad: float, zeros: str) -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = bad
    with pytest.raises(InputError, match="expected finite values"):
        quantize_tensor(weight, bits=4, group_size=32, zeros=zeros)


@pytest.mark.parametrize("zeros", ZEROS)
def test_values_beyond_float16_are_refused(zeros: str) -> None:
    with pytest.raises(InputError, match="within float16's 65504"):
        quantize_tensor(torch.full((1, 32), -2e6), bits=2, group_size=32, zeros=zeros)


def test_float64_and_bfloat16_are_taken() -> None:
    weight = torch.randn(3, 32)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert quantize_tensor(weight.to(dtype), bits=4, group_size=32).shape == (3, 32)
    with pytest.raises(InputError, match="expected a float matrix"):
        quantize_tensor(torch.ones(3, 32, dtype=torch.int32), bits=4, group_size=32)
