"""Our packed codes are MLX's words: against mlx.core itself, at every width and group."""

import platform

import numpy as np
import pytest
import torch

from qalora.errors import FormatError, InputError
from qalora.formats.mlx import GROUP_SIZES, group_size_for, pack_words, unpack_words
from qalora.tensor import BITS, GroupQuantTensor, unpack_codes
from qalora.testing import random_tensor


def to_torch(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("bits", BITS)
def test_words_are_undone(bits: int) -> None:
    packed = random_tensor(5, 128, bits=bits, group_size=32).packed
    words = pack_words(packed)
    assert words.dtype == torch.uint32 and words.shape == (5, 128 * bits // 32)
    assert torch.equal(unpack_words(words), packed)
    assert words.data_ptr() == packed.data_ptr()  # a view: nothing is packed


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_what_we_pack(bits: int, group_size: int) -> None:
    import mlx.core as mx

    tensor = random_tensor(6, 256, bits=bits, group_size=group_size)
    with mx.stream(mx.cpu):
        weight = mx.dequantize(
            mx.array(pack_words(tensor.packed).numpy()),
            mx.array(tensor.scale.numpy()),
            mx.array(tensor.min.numpy()),
            group_size=group_size,
            bits=bits,
        )
        assert torch.equal(to_torch(weight), tensor.dequantize())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_we_read_what_mlx_packs(bits: int, group_size: int) -> None:
    import mlx.core as mx

    weight = np.random.default_rng(0).standard_normal((6, 256), dtype=np.float32)
    with mx.stream(mx.cpu):
        parts = mx.quantize(mx.array(weight), group_size=group_size, bits=bits)
        words, scales, biases = (to_torch(part) for part in parts)
        expected = to_torch(mx.dequantize(*parts, group_size=group_size, bits=bits))
    tensor = GroupQuantTensor(packed=unpack_words(words), scale=scales, min=biases, bits=bits, group_size=group_size)
    codes = unpack_codes(unpack_words(words), bits)
    assert int(codes.max()) == (1 << bits) - 1
    assert torch.allclose(tensor.dequantize(), expected, rtol=0, atol=2.0**-21)  # |w| < 4: MLX may fuse the sum


@pytest.mark.parametrize("types", [("float16", "float16"), ("float16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("bits", BITS)
def test_a_float32_input_is_multiplied_in_float32(bits: int, types: tuple[str, str]) -> None:
    """Whatever the types of scales and biases: within in * 2^-24 of the sum of absolute values, against float64."""
    import mlx.core as mx

    tensor = random_tensor(16, 512, bits=bits, group_size=64)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    with mx.stream(mx.cpu):
        scales, biases = (
            mx.array(part.numpy()).astype(getattr(mx, kind))
            for part, kind in zip((tensor.scale, tensor.min), types, strict=True)
        )
        words = mx.array(pack_words(tensor.packed).numpy())
        y = mx.quantized_matmul(mx.array(x.numpy()), words, scales, biases, group_size=64, bits=bits)
        assert y.dtype == mx.float32
        found = to_torch(y).double()
    weight = tensor.dequantize().double()
    size = (
        x.double().abs() @ (tensor.scale.abs() * (1 << bits) + tensor.min.abs()).repeat_interleave(64, dim=1).double().T
    )
    assert bool(((found - x.double() @ weight.T).abs() <= 512 * 2.0**-24 * size).all())
    with mx.stream(mx.cpu):
        rounded = mx.dequantize(words, scales, biases, group_size=64, bits=bits)
    assert rounded.dtype == getattr(mx, max(types))  # the lookup of an embedding: the widest of the two


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="others fuse the product with the sum")
@pytest.mark.parametrize("bits", BITS)
def test_the_cpu_adds_one_column_after_the_other(bits: int) -> None:
    """Bit for bit: what `qalora.parity.roundings.running_sum` rests on."""
    import mlx.core as mx

    tensor = random_tensor(16, 512, bits=bits, group_size=64)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    with mx.stream(mx.cpu):
        parts = [mx.array(part.numpy()) for part in (pack_words(tensor.packed), tensor.scale, tensor.min)]
        y = to_torch(mx.quantized_matmul(mx.array(x.numpy()), *parts, group_size=64, bits=bits))
    expected = torch.zeros(3, 16)
    for a, b in zip(x.T, tensor.dequantize().T, strict=True):
        expected = expected + a[:, None] * b
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("group_size", "expected"), [(16, None), (32, 32), (48, None), (96, 32), (128, 128), (192, 64), (4096, 128)]
)
def test_larger_groups_are_cut(group_size: int, expected: int | None) -> None:
    assert group_size_for(group_size) == expected


def test_what_fills_no_words_is_refused() -> None:
    with pytest.raises(InputError, match=r"in whole words, got torch\.uint8"):
        pack_words(torch.zeros(2, 6, dtype=torch.uint8))
    with pytest.raises(FormatError, match="expected a uint32 matrix"):
        unpack_words(torch.zeros(2, 6, dtype=torch.int32))
