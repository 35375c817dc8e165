"""The kernels' roundings against slow loops that follow their sources line by line."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qalora.adapter import AdapterLayer
from qalora.parity.roundings import Rounding, product, q8_input, running_sum, side_branch
from qalora.testing import random_tensor

HALF = np.float16


def relative(a: torch.Tensor, b: np.ndarray) -> float:
    expected = torch.from_numpy(b)
    return float((a.double() - expected).norm() / expected.norm())


def q8_1_dot(x: np.ndarray, tensor) -> np.ndarray:
    """quantize_row_q8_1_ref and ggml_vec_dot_q4_1_q8_1: d in float16, s = float16(d * sum q), sumi exact."""
    codes, scale, minimum = tensor.codes().numpy().astype(int), tensor.scale.numpy(), tensor.min.numpy()
    y = np.zeros((x.shape[0], codes.shape[0]))
    for t in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[t, start : start + 32]
            d = np.float32(np.abs(block).max() / np.float32(127))
            q = np.round(block / d).astype(int) if d else np.zeros(32, int)
            s = HALF(np.float32(d) * q.sum())
            group = start // tensor.group_size
            for o in range(codes.shape[0]):
                sumi = int((codes[o, start : start + 32] * q).sum())
                y[t, o] += float(scale[o, group]) * float(HALF(d)) * sumi + float(minimum[o, group]) * float(s)
    return y


@pytest.mark.parametrize("group_size", [32, 64])
def test_q8_is_llama_cpps_integer_dot_product(group_size: int) -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=group_size)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    found = product(x, tensor, Rounding(kind="q8"))
    # ours in float32: 128 products and sums, 128 * 2^-24 = 8e-6 at the worst; the rounding itself is 4e-3
    assert relative(found, q8_1_dot(x.numpy(), tensor)) < 8e-6
    assert relative(product(x, tensor), q8_1_dot(x.numpy(), tensor)) > 1e-3


def test_q8_input_of_zeros_and_of_odd_widths() -> None:
    assert torch.equal(q8_input(torch.zeros(2, 64)), torch.zeros(2, 64))
    x = torch.randn(2, 40)
    assert q8_input(x) is x


@pytest.mark.parametrize("zeros", ["nearest", "symmetric"])
@pytest.mark.parametrize("act_order", [False, True])
def test_weights_is_a_float16_dequantizer_and_a_float32_residual(zeros: str, act_order: bool) -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=32)
    if act_order:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        tensor = replace(tensor, g_idx=(order % 4).to(torch.int32))
    index = (torch.arange(128) // 32 if tensor.g_idx is None else tensor.g_idx).numpy()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).numpy().astype(np.float64)
    codes, scale, minimum = tensor.codes().numpy().astype(int), tensor.scale.numpy(), tensor.min.numpy()
    y = np.zeros((3, 8))
    for o in range(8):
        for i in range(128):
            s, m = HALF(scale[o, index[i]]), float(minimum[o, index[i]])
            z = 8 if zeros == "symmetric" or s == 0 else min(15, max(0, int(np.round(-m / float(s)))))
            c = m + float(s) * z
            y[:, o] += x[:, i] * (float(s * HALF(codes[o, i] - z)) + c)
    found = product(torch.from_numpy(x).float(), tensor, Rounding(kind="weights", zeros=zeros))
    # ours in float32: at the worst (128 + 4) * 2^-24 of terms that cancel by a factor of some ten
    assert relative(found, y) < 8e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lora_is_pefts_lora_in_float16(bits: int) -> None:
    tensor = random_tensor(8, 128, bits=bits, group_size=32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    middle = 1 << (bits - 1)
    weight = replace(tensor, min=-middle * tensor.scale).dequantize().half().float()
    down = torch.repeat_interleave(torch.eye(4), 32, dim=1)  # the pooling matrix
    up = (tensor.min + middle * tensor.scale).half().float()
    inner = (x.half().float() @ down.T).half().float()
    expected = x @ weight.T + (inner @ up.T).half().float()
    found = product(x, tensor, Rounding(kind="lora", zeros="symmetric"))
    # float32 sums of 128 terms, and a float16 that float32's order may round to its neighbour
    assert relative(found, expected.double().numpy()) < 2.0**-11
    assert relative(found, product(x, tensor).double().numpy()) > 1e-5


def test_a_side_branch_in_float16_is_a_plain_lora_in_float16() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 4, generator=rng), torch.randn(8, 4, generator=rng)
    layer = AdapterLayer(a=a, b=b, pool_size=32, scaling=0.5, factor=0.125)
    x = torch.randn(3, 128, generator=rng)
    plain = (0.25 * a).repeat_interleave(32, dim=1)
    inner = (x.half().float() @ plain.half().float().T).half().float()
    expected = 0.5 * (inner @ b.half().float().T).half().float()
    assert relative(side_branch(x, layer, Rounding(kind="lora")), expected.double().numpy()) < 2.0**-11
    exact = (x.double() @ plain.double().T @ b.double().T * 0.5).numpy()
    assert relative(side_branch(x, layer), exact) < 8e-6


def test_int8_rounds_by_group() -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=64)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    coarse = x.clone()
    for t in range(3):
        for start in (0, 64):
            step = x[t, start : start + 64].abs().max() / 127
            coarse[t, start : start + 64] = torch.round(x[t, start : start + 64] / step) * step
    pooled = (x - coarse).view(3, 2, 64).sum(dim=2)  # the residual's pool(x) is not rounded
    zero = torch.round(-tensor.min / torch.where(tensor.scale == 0, 1.0, tensor.scale)).clamp(0, 15)
    zero = torch.where(tensor.scale == 0, 8.0, zero)
    expected = coarse @ tensor.dequantize().T + pooled @ (tensor.min + tensor.scale * zero).T
    found = product(x, tensor, Rounding(kind="int8"))
    assert relative(found, expected.double().numpy()) < 8e-6  # as above


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bits_round_input_weight_and_output(kind: str) -> None:
    dtype = getattr(torch, kind)
    tensor = random_tensor(8, 128, bits=4, group_size=32)
    x = torch.randn(3, 128)
    expected = (x.to(dtype).float() @ tensor.dequantize().to(dtype).float().T).to(dtype).float()
    assert torch.equal(product(x, tensor, Rounding(kind=kind)), expected)
    assert torch.equal(product(x, tensor.dequantize(), Rounding(kind=kind)), expected)


def test_another_order_is_the_same_but_for_float32() -> None:
    tensor = random_tensor(64, 512, bits=4, group_size=32)
    x = torch.randn(16, 512)
    usual, other = product(x, tensor), product(x, tensor, permuted=True)
    assert 0 < float((usual - other).norm() / usual.norm()) < 512 * 2.0**-24


def test_a_running_sum_is_noisier_the_longer_it_is() -> None:
    """As many times as is said of other numbers, within a quarter, since both errors are random.

    How many times is the processor's: its kernels sum a long row in more blocks or fewer.
    """
    times = {columns: running_sum(columns) for columns in (64, 1024, 4096, 14336)}
    assert times[64] < 1.5 and 2.5 < times[4096] < 4.5 and times[14336] > 2.5
    assert running_sum(4096) == times[4096]
    rng = torch.Generator().manual_seed(1)
    for columns in (1024, 4096, 14336):
        x, weight = torch.randn(8, columns, generator=rng), torch.randn(64, columns, generator=rng)
        exact = x.double() @ weight.T.double()
        order = torch.randperm(columns, generator=rng)
        blocked, permuted = x @ weight.T, x[:, order] @ weight[:, order].T
        running = torch.zeros_like(blocked)
        for a, b in zip(x.T, weight.T, strict=True):
            running = running + a[:, None] * b
        measured = float((running.double() - exact).norm()) / float((permuted - blocked).norm())
        assert measured / times[columns] == pytest.approx(1, abs=0.25)
