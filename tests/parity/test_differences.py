"""Errors against an obvious loop, what rounding explains and what not, and each fault told by name."""

import math
from dataclasses import replace

import pytest
import torch

from qalora.parity.differences import compare_tensors
from qalora.parity.findings import TensorDifference, add_up
from qalora.quantization.rounding import quantize_tensor
from qalora.tensor import GroupQuantTensor, pack_codes
from qalora.testing import random_tensor


def floats(rows: int = 16, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def with_code(tensor: GroupQuantTensor, row: int, column: int, code: int) -> GroupQuantTensor:
    codes = tensor.codes().clone()
    codes[row, column] = code
    return replace(tensor, packed=pack_codes(codes, tensor.bits))


def slow_errors(mine: GroupQuantTensor, theirs: GroupQuantTensor | torch.Tensor) -> tuple[float, float, float, float]:
    """(max, RMS, max in steps, RMS in steps), a weight at a time in Python's floats."""
    grid = theirs if isinstance(theirs, GroupQuantTensor) else mine

    def weight(tensor: GroupQuantTensor | torch.Tensor, row: int, column: int) -> float:
        if isinstance(tensor, torch.Tensor):
            return float(tensor[row, column])
        group = column // tensor.group_size
        return float(tensor.scale[row, group]) * int(tensor.codes()[row, column]) + float(tensor.min[row, group])

    errors, steps = [], []
    for row in range(mine.shape[0]):
        for column in range(mine.shape[1]):
            scale = abs(float(grid.scale[row, column // grid.group_size]))
            error = abs(weight(mine, row, column) - weight(theirs, row, column))
            errors.append(error)
            steps.append(error / scale if scale else 0.0)

    def rms(values: list[float]) -> float:
        return math.sqrt(sum(value * value for value in values) / len(values))

    return max(errors), rms(errors), max(steps), rms(steps)


@pytest.mark.parametrize("reference", ["quantized", "floats"])
def test_errors_are_those_of_a_slow_loop(reference: str) -> None:
    theirs = random_tensor(4, 64, bits=4, group_size=32)
    mine = random_tensor(4, 64, bits=4, group_size=16, seed=1)
    other = theirs if reference == "quantized" else theirs.dequantize()
    found = compare_tensors("w", mine, other)
    wanted = slow_errors(mine, other)
    got = (found.error_max, found.error_rms, found.step_max, found.step_rms)
    assert got == pytest.approx(wanted, rel=1e-12)
    assert found.measured == found.stepped == 4 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantized_weights_may_be_rounded_once(dtype: torch.dtype) -> None:
    """Half an ULP of what they are stored in; the next value over is no rounding."""
    reference = random_tensor(8, 128, bits=4, group_size=32)
    rounded = reference.dequantize().to(dtype)
    found = compare_tensors("w", rounded, reference)
    assert found.values_beyond == 0 and (found.values_differ > 0) == (dtype != torch.float32)
    off = rounded.clone()
    if dtype == torch.float32:
        off[5, 7] += 2.0**-20  # dequantizing may round by 2^-23 (|scale| codes + |min|), and these are below 1
    else:
        for _ in range(2):
            off[5, 7] = torch.nextafter(off[5, 7], torch.tensor(9.0, dtype=dtype))
    assert compare_tensors("w", off, reference).values_beyond == 1


@pytest.mark.parametrize(
    ("mine", "theirs", "allowed"),
    [
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float64, True),
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float16, False),
        (torch.float16, torch.float16, False),
    ],
)
def test_floats_may_be_rounded_to_a_narrower_dtype_and_no_other(
    mine: torch.dtype, theirs: torch.dtype, allowed: bool
) -> None:
    reference = (floats().double() * 1.1).to(theirs)
    assert compare_tensors("w", reference.to(mine), reference).values_beyond == 0
    off = reference.to(mine).clone()
    off[3, 3] = torch.nextafter(off[3, 3], torch.tensor(9.0, dtype=mine))
    found = compare_tensors("w", off, reference)
    assert found.values_beyond == 1
    assert found.values_differ > 1 if allowed else found.values_differ == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zeros", ["real", "integer"])
def test_the_nearest_code_of_a_float_is_half_a_step_away(bits: int, zeros) -> None:
    reference = floats()
    mine = quantize_tensor(reference, bits=bits, group_size=32, zeros=zeros)
    found = compare_tensors("w", mine, reference, floats=True)
    assert found.requantized > 0 and found.step_beyond == 0 and found.values_beyond == 0
    assert 0.4 < found.step_max < 0.7
    code = int(mine.codes()[9, 40])
    off = compare_tensors("w", with_code(mine, 9, 40, code ^ (1 << (bits - 1))), reference, floats=True)
    assert off.step_beyond == 1 and off.step_max > 1


def test_floats_of_a_quantized_model_are_to_stay_floats() -> None:
    reference = floats()
    mine = quantize_tensor(reference, bits=8, group_size=32, zeros="real")
    found = compare_tensors("w", mine, reference)
    assert found.values_beyond > 0 and found.requantized == 0
    held = compare_tensors("w", mine, mine.dequantize())  # in integers, and the very same
    assert held.same


def test_weights_that_zeros_would_be_nearer_to_are_none_of_the_model_s() -> None:
    mine = quantize_tensor(floats(seed=1), bits=4, group_size=32, zeros="real")
    found = compare_tensors("w", mine, floats(), floats=True)
    assert found.requantized == 0 and found.values_beyond == found.values_differ == found.values


@pytest.mark.parametrize("off", [1, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_off_by_one_are_counted_round_the_end_too(bits: int, off: int) -> None:
    tensor = random_tensor(64, 128, bits=bits, group_size=32, zeros="integer")
    safe = torch.where(tensor.scale == 0, 1.0, tensor.scale)
    zero = torch.where(tensor.scale == 0, 0.0, torch.round(-tensor.min / safe))
    zero[5, :2] = torch.tensor([0, (1 << bits) - 1])
    tensor = replace(tensor, min=-tensor.scale * zero)
    mine = replace(tensor, min=-tensor.scale * ((zero + off) % (1 << bits)))
    found = compare_tensors("w", mine, tensor)
    other = {"zeros_above": found.zeros_above, "zeros_below": found.zeros_below}
    named = other.pop("zeros_above" if off == 1 else "zeros_below")
    assert named == found.min_differ == int((tensor.scale != 0).sum())
    # at 2 bits a group in four goes round the end, and 3 steps are not 1
    assert list(other.values()) == [0]


def test_other_minima_are_no_zero_points_off_by_one() -> None:
    tensor = random_tensor(64, 128, bits=4, group_size=32)
    moved = 0.05 * tensor.scale * torch.randn(tensor.scale.shape, generator=torch.Generator().manual_seed(0))
    found = compare_tensors("w", replace(tensor, min=tensor.min + moved), tensor)
    assert found.min_differ > 200 and (found.zeros_above, found.zeros_below) == (0, 0)


@pytest.mark.parametrize("reference", ["quantized", "floats"])
def test_a_transposed_square_is_told_by_name(reference: str) -> None:
    weight = floats(64, 64)
    theirs = quantize_tensor(weight, bits=4, group_size=32, zeros="real") if reference == "quantized" else weight
    mine = quantize_tensor(weight.T.contiguous(), bits=4, group_size=32, zeros="real")
    found = compare_tensors("w", mine, theirs, floats=reference == "floats")
    assert (found.transposed, found.rows_moved, found.codes_differ, found.values_differ) == (1, 0, 0, 0)
    assert compare_tensors("w", weight.T.contiguous(), weight).transposed == 1
    assert compare_tensors("w", floats(64, 64, seed=5), weight).transposed == 0


def test_rows_of_floats_that_moved() -> None:
    weight = floats(32, 64)
    order = torch.arange(32)
    order[[3, 9]] = order[[9, 3]]
    found = compare_tensors("w", weight[order], weight)
    assert (found.rows_moved, found.values_differ) == (2, 0)
    mine = quantize_tensor(weight, bits=4, group_size=32, zeros="real")
    assert compare_tensors("w", mine.dequantize()[order], mine).rows_moved == 2


def test_the_first_code_that_differs_has_a_place() -> None:
    tensor = random_tensor(16, 128, bits=4, group_size=32)
    mine = tensor
    for row, column in ((12, 3), (7, 101), (7, 120)):
        mine = with_code(mine, row, column, int(tensor.codes()[row, column]) ^ 1)
    found = compare_tensors("w", mine, tensor)
    assert (found.codes_differ, found.code_at) == (3, (7, 101))


def test_parts_add_up_to_the_whole() -> None:
    theirs = random_tensor(32, 128, bits=4, group_size=32)
    mine = random_tensor(32, 128, bits=4, group_size=32, seed=1)
    whole = compare_tensors("w", mine, theirs)
    parts = [compare_tensors("w", mine.rows(n, n + 8), theirs.rows(n, n + 8)) for n in range(0, 32, 8)]
    total = add_up("w", parts)
    for field in ("error_rms", "step_rms"):
        assert getattr(total, field) == pytest.approx(getattr(whole, field), rel=1e-12)
        total, whole = replace(total, **{field: 0.0}), replace(whole, **{field: 0.0})
    assert total == whole
    assert add_up("w", []) == TensorDifference(name="w")
