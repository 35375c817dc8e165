"""Weights in one pass: the plain path is the oracle, everywhere.

Without a GPU the kernel is run by Triton's interpreter, and compiled for GPUs to look for fused multiply-adds; both
where Triton is installed (`pip install triton`; torch's CUDA builds bring it).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from qalora import fused, tensor
from qalora.adapter import AdapterLayer
from qalora.fused import dequantize
from qalora.integrations.layers import QuantizedLinear
from qalora.tensor import BITS
from qalora.testing import random_tensor
from qalora.training.fast import SharedInput, refresh, share_inputs
from qalora.training.layer import FoldedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(24, 8), (1056, 32), (1040, 1040), (4096, 128)]
"""Columns and group size: less than a program's columns, more, no multiple, several."""

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def gpu(function):
    """A test that needs a GPU, skipped by name where there is none."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(function))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_given_to_fill_is_filled_and_nothing_beside(bits: int, dtype: torch.dtype) -> None:
    made = random_tensor(5, 96, bits=bits, group_size=32)
    whole = torch.full((5, 99), 7, dtype=dtype)
    part = whole[:, :96]
    assert dequantize(made.packed, made.scale, made.min, bits, out=part) is part
    assert torch.equal(whole[:, :96], made.dequantize().to(dtype))
    assert bool((whole[:, 96:] == 7).all())
    assert torch.equal(dequantize(made.packed, made.scale, made.min, bits), made.dequantize())


# ---- the check before the kernel is used


def _like_a_kernel(weight) -> ModuleType:
    def fill(out: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> None:
        out.copy_(weight(packed, scale, minimum, bits))

    return cast(ModuleType, SimpleNamespace(fill=fill))


def _rounded_once(packed: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """As a fused multiply-add: float64 holds the product exactly."""
    return tensor.dequantize(packed, scale.double(), minimum.double(), bits).float()


@pytest.mark.parametrize("bits", BITS)
def test_the_check_sees_a_fused_multiply_add(bits: int) -> None:
    here = torch.device("cpu")
    assert fused._differing(_like_a_kernel(tensor.dequantize), here, bits, torch.float32) == 0
    assert fused._differing(_like_a_kernel(_rounded_once), here, bits, torch.float32) > 0


@pytest.mark.parametrize("bits", BITS)
def test_a_float16_scale_leaves_nothing_to_see(bits: int) -> None:
    """What the docstring says of it: the product is exact."""
    made = random_tensor(32, 1024, bits=bits, group_size=32)
    assert torch.equal(_rounded_once(made.packed, made.scale, made.min, bits), made.dequantize())


@with_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs here")
def test_a_kernel_that_does_not_run_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"the kernel on cpu does not run .*: weights are made by plain torch"):
        assert fused._proven.__wrapped__(torch.device("cpu"), 4, torch.float32) is None


# ---- the kernel, without a GPU

INTERPRETED = f"""
import torch
from qalora.fused import kernel
from qalora.tensor import BITS, GroupQuantTensor
from qalora.testing import random_tensor

for bits in BITS:
    for columns, group_size in {SIZES}:
        made = random_tensor(5, columns, bits=bits, group_size=group_size)
        wild = GroupQuantTensor.from_codes(
            made.codes(), torch.randn(made.scale.shape), torch.randn(made.min.shape), bits, group_size
        )
        even = GroupQuantTensor.from_codes(
            made.codes(), torch.full(made.scale.shape, -0.25), torch.zeros(made.min.shape), bits, group_size
        )
        # the interpreter cuts bfloat16 off where GPUs round, so that only what bfloat16 holds can be compared
        cases = (made, torch.float32), (wild, torch.float32), (wild, torch.float16), (even, torch.bfloat16)
        for tensor, dtype in cases:
            whole = torch.full((5, columns + 3), 7, dtype=dtype)
            kernel.fill(whole[:, :columns], tensor.packed, tensor.scale, tensor.min, bits)
            assert torch.equal(whole[:, :columns], tensor.dequantize().to(dtype)), (bits, columns, dtype)
            assert bool((whole[:, columns:] == 7).all())
"""

COMPILED = r"""
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from qalora.fused import kernel
from qalora.tensor import BITS

pointers = {"packed": "*u8", "scale": "*fp32", "minimum": "*fp32"}
numbers = {name: "i32" for name in ("stride", "columns", "row_bytes", "groups", "group_size")}
for bits in BITS:
    for out, rounding in (("*fp32", None), ("*bf16", "cvt.rn.bf16.f32"), ("*fp16", "cvt.rn.f16.f32")):
        for fusion in (False, True):
            signature = {"out": out, **pointers, **numbers, "BITS": "constexpr", "BLOCK": "constexpr"}
            source = ASTSource(kernel._fill, signature, {"BITS": bits, "BLOCK": kernel.BLOCK})
            made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fusion})
            text = made.asm["ptx"]
            assert bool(re.search(r"\bfma\.", text)) == fusion, (bits, out, fusion)
            assert rounding is None or rounding in text, (bits, out)
            assert ".ftz" not in text
"""


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "interpret"), [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"]
)
def test_the_kernel_without_a_gpu(script: str, interpret: str) -> None:
    """Interpreted, it gives the plain path's bits; compiled, it has a product and a sum, and fused ones if let."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": interpret},
    )
    assert done.returncode == 0, done.stderr


# ---- the kernel, on a GPU


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_gives_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    for columns, group_size in SIZES:
        made = random_tensor(300, columns, bits=bits, group_size=group_size)
        for scale in (made.scale, torch.randn(made.scale.shape)):
            wanted = tensor.dequantize(made.packed, scale, made.min, bits).to(dtype)
            whole = torch.full((300, columns + 3), 7, dtype=dtype, device="cuda")
            parts = made.packed.cuda(), scale.cuda(), made.min.cuda()
            dequantize(*parts, bits, out=whole[:, :columns])
            assert torch.equal(whole[:, :columns].cpu(), wanted)
            assert bool((whole[:, columns:] == 7).all())
    assert fused._proven(torch.device("cuda", torch.cuda.current_device()), bits, dtype) is not None


def _trained(device: str) -> FoldedLinear:
    layer = FoldedLinear(
        random_tensor(96, 256, bits=3, group_size=64),
        None,
        name="layer",
        rank=4,
        factor=0.5,
        pool_size=32,
        minima="float16",
        rng=torch.Generator().manual_seed(0),
    )
    layer.b.data = torch.randn(layer.b.shape, generator=torch.Generator().manual_seed(1))
    return layer.to(device)


@gpu
def test_a_trained_layer_has_the_same_weights_on_a_gpu() -> None:
    here, there = _trained("cpu"), _trained("cuda")
    assert isinstance(here.adapter_layer(), AdapterLayer)
    assert torch.equal(there.weight().cpu(), here.weight())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(_step_weight(there, dtype, keep=True).cpu(), _step_weight(here, dtype, keep=False))


def _step_weight(layer: FoldedLinear, dtype: torch.dtype, *, keep: bool) -> torch.Tensor:
    shared: list[SharedInput] = share_inputs([("layer", layer)], dtype, keep=keep)
    refresh(shared)
    return shared[0].weight()


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_in_transformers_has_the_same_weights_on_a_gpu(dtype: torch.dtype) -> None:
    made = random_tensor(96, 256, bits=5, group_size=32)
    values = {"codes": made.packed, "scale": made.scale.half(), "min": made.min.half()}
    layer = QuantizedLinear({name: (value.dtype, tuple(value.shape)) for name, value in values.items()}, 5, None, None)
    layer.load_state_dict(values, assign=True)
    wanted = layer.plain_weight(dtype)
    assert torch.equal(wanted, made.dequantize().to(dtype))
    assert torch.equal(layer.cuda().plain_weight(dtype).cpu(), wanted)
