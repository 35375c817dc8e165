"""Weights compared: what is the same is found to be, and each planted difference is counted where it is."""

import math
from dataclasses import replace

import pytest
import torch

from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters.essentials import essentials
from qalora.parity.weights import compare_tensors, compare_weights, ulp
from qalora.residual import from_residual, to_residual
from qalora.tensor import GroupQuantTensor
from qalora.testing import random_tensor

HALVES = (torch.float16, torch.float16)


def same_in_other_groups(tensor: GroupQuantTensor) -> GroupQuantTensor:
    return tensor.regrouped(tensor.group_size // 2)


def same_in_wider_codes(tensor: GroupQuantTensor) -> GroupQuantTensor:
    return GroupQuantTensor.from_codes(tensor.codes(), tensor.scale, tensor.min, 8, tensor.group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("form", [same_in_other_groups, same_in_wider_codes, lambda tensor: tensor])
def test_the_same_weight_in_another_form_is_the_same(bits: int, form) -> None:
    tensor = random_tensor(8, 128, bits=bits, group_size=64)
    for mine, theirs in ((form(tensor), tensor), (tensor, form(tensor))):
        found = compare_tensors("w", mine, theirs, HALVES)
        assert found.same and found.codes == 8 * 128


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_codes_shifted_with_their_minimum_are_the_same(bits: int) -> None:
    """As Q8_0 holds integer zeros: codes + (128 - zero), min -128 * scale."""
    tensor = random_tensor(8, 128, bits=bits, group_size=32, zeros="integer")
    zero = torch.round(-tensor.min / torch.where(tensor.scale == 0, 1.0, tensor.scale)).repeat_interleave(32, dim=1)
    codes = (tensor.codes() + 128 - zero).to(torch.uint8)
    shifted = GroupQuantTensor.from_codes(codes, tensor.scale, -128 * tensor.scale, 8, 32)
    assert torch.equal(shifted.dequantize(), tensor.dequantize())
    assert compare_tensors("w", shifted, tensor, HALVES).same
    codes[4, 40] += 1
    wrong = GroupQuantTensor.from_codes(codes, tensor.scale, -128 * tensor.scale, 8, 32)
    found = compare_tensors("w", wrong, tensor, HALVES)
    assert (found.codes_differ, found.scale_differ, found.min_differ) == (1, 0, 0)


@pytest.mark.parametrize("row", [0, 4])  # row 0 has scale 0: its codes change no weight, and still count
def test_one_code(row: int) -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=32)
    codes = tensor.codes()
    codes[row, 77] ^= 8
    mine = GroupQuantTensor.from_codes(codes, tensor.scale, tensor.min, 4, 32)
    found = compare_tensors("w", mine, tensor, HALVES)
    assert (found.codes_differ, found.scale_differ, found.min_differ) == (1, 0, 0)


@pytest.mark.parametrize("steps", [1, 2, -1])
def test_scale_and_min_are_counted_in_ulp_of_the_reference(steps: int) -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=32)
    scale, minimum = tensor.scale.half(), tensor.min.half()
    scale.view(torch.int16)[4, 1] += steps
    minimum.view(torch.int16)[5, 0] -= 3 * steps
    found = compare_tensors("w", replace(tensor, scale=scale.float(), min=minimum.float()), tensor, HALVES)
    assert (found.codes_differ, found.scale_differ, found.min_differ, found.min_beyond) == (0, 1, 1, 1)
    assert found.scale_ulp == abs(steps)
    assert found.min_ulp == 3 * abs(steps)


def test_float32_minima_behind_a_residual_have_the_residuals_own_rounding() -> None:
    tensor = random_tensor(64, 128, bits=4, group_size=32)
    tensor = replace(tensor, min=tensor.min + 1e-5 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    held = to_residual(tensor, "symmetric")
    mine = replace(tensor, min=from_residual(tensor.scale, held.zero, held.c))
    found = compare_tensors("w", mine, tensor, residual=True)
    assert not held.exact and found.min_differ > 0 and found.min_beyond == 0
    assert compare_tensors("w", mine, tensor).min_beyond == found.min_differ
    off = mine.min.clone()
    off[9, 2] += 2.0**-21 * (tensor.min[9, 2].abs() + 16 * tensor.scale[9, 2].abs())
    assert compare_tensors("w", replace(mine, min=off), tensor, residual=True).min_beyond == 1


def test_act_order() -> None:
    g_idx = torch.randperm(128, generator=torch.Generator().manual_seed(0)).to(torch.int32) % 4
    tensor = replace(random_tensor(8, 128, bits=4, group_size=32), g_idx=g_idx)
    assert compare_tensors("w", tensor, tensor, HALVES).same
    found = compare_tensors("w", replace(tensor, g_idx=None), tensor, HALVES)
    assert found.codes_differ == 0 and found.scale_differ > 0 and found.min_differ > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_are_compared_after_exact_widening(dtype: torch.dtype) -> None:
    values = torch.randn(16, 8).to(dtype)
    assert compare_tensors("w", values.float(), values).same
    wrong = values.float().clone()
    wrong[3, 3] = torch.nextafter(wrong[3, 3], torch.tensor(9.0))
    found = compare_tensors("w", wrong, values)
    assert (found.values, found.values_differ) == (128, 1)
    assert 0 < found.values_max < 1e-6


def test_a_quantized_tensor_against_its_floats() -> None:
    tensor = random_tensor(8, 128, bits=8, group_size=32)
    assert compare_tensors("w", tensor.dequantize(), tensor).same
    assert compare_tensors("w", tensor, tensor.dequantize()).same


def test_nan_is_the_same_as_nan_and_infinitely_far_from_the_rest() -> None:
    values = torch.tensor([1.0, math.nan])
    assert compare_tensors("w", values, values.clone()).same
    found = compare_tensors("w", torch.tensor([math.nan, math.nan]), values)
    assert (found.values_differ, found.values_max) == (1, math.inf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ulp_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 1.5, -3.0, 0.1, 6e-5, 6e-8, 1000.0]).to(dtype)
    up = torch.nextafter(values.abs(), torch.tensor(math.inf, dtype=dtype)).double() - values.abs().double()
    assert torch.equal(ulp(values.float(), dtype), up)


def test_a_config_says_the_same_in_several_ways() -> None:
    sizes = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    }
    old = {**sizes, "rope_theta": 1e5, "rms_norm_eps": 1e-5, "head_dim": 16}
    new = {
        **sizes,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "rms_norm_eps": 9.999999747378752e-06,
        "torch_dtype": "float16",
    }
    assert essentials(old) == essentials(new)
    assert essentials({**old, "rope_theta": 1e4}) != essentials(new)
    scaled = {**old, "rope_scaling": {"type": "linear", "factor": 2}}
    assert essentials(scaled) == essentials(
        {**new, "rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}}
    )
    assert essentials(scaled) != essentials(old)


def test_the_context_is_noted_and_fails_nothing(base: Checkpoint) -> None:
    found = compare_weights(replace(base, config={**base.config, "max_position_embeddings": 128}), base)
    assert found.notes == ("max_position_embeddings: 128 instead of 512",) and found.config == ()
    assert compare_weights(base, base).notes == ()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_transposed_weight_is_told_square_or_not(base: Checkpoint, name: str) -> None:
    turned = base.tensors[name].load_quantized().dequantize().T.contiguous()
    lazy = LazyTensor(
        name=name, shape=tuple(turned.shape), dtype=torch.float32, read=lambda start, stop: turned[start:stop]
    )
    found = compare_weights(replace(base, tensors={**base.tensors, name: lazy}), base)
    if turned.shape[0] == turned.shape[1]:
        assert [(part.name, part.transposed) for part in found.different] == [(name, 1)] and found.shapes == ()
    else:
        assert found.shapes == (f"{name}: [64, 128] instead of [128, 64], transposed",)
