"""Blocks against gguf-py's own dequantizer and quantizer, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.formats.gguf_blocks import BLOCK, BLOCK_TYPES, decode, encode
from qalora.testing import assert_same_tensor, random_tensor


def tensor_for(kind: str, out: int, columns: int, seed: int = 0):
    block = BLOCK_TYPES[kind]
    tensor = random_tensor(out, columns, bits=block.bits, group_size=BLOCK, seed=seed)
    if block.zero is None:
        return tensor
    from dataclasses import replace

    return replace(tensor, min=-tensor.scale * block.zero)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@given(out=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 1 << 20))
@settings(max_examples=25, deadline=None)
def test_gguf_reads_what_we_encode(kind: str, out: int, blocks: int, seed: int) -> None:
    tensor = tensor_for(kind, out, blocks * BLOCK, seed)
    data = encode(tensor, kind)
    assert data.shape == (out, blocks * BLOCK_TYPES[kind].nbytes)
    theirs = dequantize(data.numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(theirs, tensor.dequantize().numpy())
    assert_same_tensor(decode(data, kind), tensor)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_we_decode_what_gguf_encodes(kind: str) -> None:
    weights = np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32)
    data = quantize(weights, GGMLQuantizationType[kind])
    ours = decode(torch.from_numpy(data), kind)
    assert np.array_equal(ours.dequantize().numpy(), dequantize(data, GGMLQuantizationType[kind]))
    assert torch.equal(encode(ours, kind), torch.from_numpy(data))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_bytes_are_a_tensor(kind: str) -> None:
    """Whatever codes a file holds; scale and min from the first encoding, so that they are finite."""
    data = encode(tensor_for(kind, 4, 64), kind).view(4, 2, -1).clone()
    rng = torch.Generator().manual_seed(3)
    head = 2 if BLOCK_TYPES[kind].zero is not None else 4
    data[..., head:] = torch.randint(0, 256, data[..., head:].shape, generator=rng, dtype=torch.uint8)
    assert torch.equal(encode(decode(data.view(4, -1), kind), kind), data.view(4, -1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_narrower_codes_go_into_wider_types(bits: int) -> None:
    """2 and 3 bits in Q4_1, integer zeros of up to 7 bits in Q8_0: other codes, the same weights."""
    if bits <= 4:
        tensor = random_tensor(8, 64, bits=bits, group_size=BLOCK)
        assert np.array_equal(
            dequantize(encode(tensor, "Q4_1").numpy(), GGMLQuantizationType.Q4_1), tensor.dequantize()
        )
    integer = random_tensor(8, 64, bits=bits, group_size=BLOCK, zeros="integer")
    if bits < 8:
        assert np.array_equal(
            dequantize(encode(integer, "Q8_0").numpy(), GGMLQuantizationType.Q8_0), integer.dequantize()
        )
