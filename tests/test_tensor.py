"""The canonical tensor against a slow, obvious loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.errors import InputError
from qalora.tensor import (
    BITS,
    GroupQuantTensor,
    all_finite,
    holds_float16,
    integer_zeros,
    pack_codes,
    same_bits,
    unpack_codes,
)
from qalora.testing import assert_same_tensor, random_tensor


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), eighths=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codes_are_a_little_endian_bit_stream(bits: int, rows: int, eighths: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 8 * eighths), generator=rng, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    for row in range(rows):
        number = int.from_bytes(bytes(packed[row].tolist()), "little")
        assert [(number >> (i * bits)) % (1 << bits) for i in range(codes.shape[1])] == codes[row].tolist()
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_lie_apart_or_begin_anywhere_are_packed_too(bits: int) -> None:
    wide = torch.randint(0, 1 << bits, (6, 43), dtype=torch.uint8)
    for codes in (wide[:, 1:41], wide[:, ::4][:, :8], wide.view(-1)[3:243].view(6, 40), wide[:0, :16], wide[:, :0]):
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits), codes)
    packed = torch.randint(0, 256, (3, 4 * bits + 1), dtype=torch.uint8)[:, 1:]
    assert torch.equal(pack_codes(unpack_codes(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_many_tiles_are_packed_like_one(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3000, 1024), dtype=torch.uint8)  # three tiles
    packed = pack_codes(codes, bits)
    assert torch.equal(packed[2900:], pack_codes(codes[2900:], bits))
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_dequantize_is_the_formula(bits: int, group_size: int) -> None:
    tensor = random_tensor(5, 96, bits=bits, group_size=group_size)
    weight, codes = tensor.dequantize(), tensor.codes()
    for o in range(5):
        for i in range(96):
            scale, minimum = tensor.scale[o, i // group_size], tensor.min[o, i // group_size]
            assert weight[o, i] == scale * int(codes[o, i]) + minimum


def test_act_order_groups_follow_g_idx() -> None:
    plain = random_tensor(4, 64, bits=4, group_size=32)
    g_idx = torch.arange(64, dtype=torch.int32).flip(0) // 32
    tensor = GroupQuantTensor(packed=plain.packed, scale=plain.scale, min=plain.min, bits=4, group_size=32, g_idx=g_idx)
    swapped = GroupQuantTensor(
        packed=plain.packed, scale=plain.scale.flip(1), min=plain.min.flip(1), bits=4, group_size=32
    )
    assert torch.equal(tensor.dequantize(), swapped.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_integer_zeros_are_found_where_they_are(bits: int) -> None:
    tensor = random_tensor(6, 128, bits=bits, group_size=32, zeros="integer")
    zero = integer_zeros(tensor)
    assert zero is not None
    assert torch.equal(-tensor.scale * zero, tensor.min)
    assert (zero[0] == 1 << (bits - 1)).all()  # a scale of 0: the middle one
    assert integer_zeros(random_tensor(6, 128, bits=bits, group_size=32)) is None


def test_finer_groups_are_the_same_weights() -> None:
    tensor = random_tensor(4, 128, bits=3, group_size=64)
    finer = tensor.regrouped(16)
    assert finer.packed is tensor.packed
    assert torch.equal(finer.dequantize(), tensor.dequantize())
    with pytest.raises(InputError, match="groups of 64 cannot be split into groups of 48"):
        tensor.regrouped(48)


def test_rows_are_rows() -> None:
    tensor = random_tensor(9, 64, bits=5, group_size=32)
    assert torch.equal(tensor.rows(2, 7).dequantize(), tensor.dequantize()[2:7])


def test_float16_values_are_recognised() -> None:
    assert holds_float16(torch.tensor([0.0, 1.5, -65504.0, 2.0**-24]))
    assert not holds_float16(torch.tensor([1.0 + 2.0**-11]))
    assert not holds_float16(torch.tensor([65520.0]))


def _fields(**changes: object) -> dict[str, object]:
    good = random_tensor(4, 64, bits=4, group_size=32)
    fields = {"packed": good.packed, "scale": good.scale, "min": good.min, "bits": 4, "group_size": 32}
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits": 7}, "bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"group_size": 48}, "group_size: expected a divisor of in = 64, got 48; these fit: 16, 32, 64"),
        ({"group_size": 0}, "expected a divisor of in = 64, got 0"),
        ({"packed": torch.zeros(4, 32, dtype=torch.int32)}, r"packed codes: expected uint8 \[out, in\*4/8\]"),
        ({"scale": torch.zeros(4, 3)}, r"scale: expected float32 \[4, 2\], got torch.float32 \[4, 3\]"),
        ({"scale": torch.zeros(4, 2).half()}, r"scale: expected float32 \[4, 2\], got torch.float16"),
        ({"min": torch.full((4, 2), torch.nan)}, "min: expected finite values, got NaN or Inf"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"g_idx: expected values in 0..1, got 2..2"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx: expected int32 \[64\]"),
    ],
)
def test_bad_fields_are_one_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        GroupQuantTensor(**_fields(**changes))  # type: ignore[arg-type]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="expected values below 8 at 3 bits, got 8"):
        pack_codes(torch.full((1, 8), 8, dtype=torch.uint8), 3)
    with pytest.raises(InputError, match="multiple of 8"):
        pack_codes(torch.zeros(1, 12, dtype=torch.uint8), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_value_among_many_is_seen(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.linspace(-1, 1, 3000).to(dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(values[1])
    assert all_finite(torch.full((3000,), largest, dtype=dtype))  # whose sum overflows
    for bad in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf], [largest, largest, -torch.inf]):
        for at in (0, 1500, 2990):
            assert not all_finite(values.index_put((torch.arange(at, at + len(bad)),), torch.tensor(bad, dtype=dtype)))


def test_the_same_bits_are_the_same_type_shape_and_bytes() -> None:
    values = torch.randn(1 << 11, 1 << 10).half()  # more than a tile
    assert same_bits(values, values.clone()) and same_bits(values[:, ::2], values[:, ::2].contiguous())
    other = values.clone()
    other[-1, -1] += 1
    assert not same_bits(values, other)
    assert not same_bits(values, values.view(torch.int16)) and not same_bits(values, values.reshape(-1))
    assert same_bits(torch.tensor(torch.nan), torch.tensor(torch.nan))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))


def test_differences_are_collected() -> None:
    tensor = random_tensor(4, 64, bits=4, group_size=32)
    other = GroupQuantTensor(**_fields(min=tensor.min + 1, scale=tensor.scale * 2))  # type: ignore[arg-type]
    assert_same_tensor(tensor, tensor)
    with pytest.raises(AssertionError, match="scale: 6 values differ; min: 8 values differ"):
        assert_same_tensor(other, tensor)  # a scale of 0, in the first row, stays
