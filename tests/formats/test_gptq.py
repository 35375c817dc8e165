"""GPTQ's words against a loop over single bits, and against GPTQModel's own packer and unpacker."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.errors import FormatError, InputError
from qalora.formats.gptq import BITS, pack_qweight, pack_qzeros, unpack_qweight, unpack_qzeros
from qalora.tensor import pack_codes


def naive_words(columns: torch.Tensor, bits: int) -> list[list[int]]:
    """Each column of codes [n, m] as one number, lowest code first, cut into words of 32 bits: [n*bits/32][m]."""
    words = [[] for _ in range(columns.shape[0] * bits // 32)]
    for column in columns.t().tolist():
        number = sum(code << (bits * i) for i, code in enumerate(column))
        for row in words:
            row.append(number & 0xFFFFFFFF)
            number >>= 32
    return words


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return (words.long() & 0xFFFFFFFF).tolist()


def random_codes(rows: int, columns: int, bits: int, seed: int, low: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, 1 << bits, (rows, columns), generator=rng, dtype=torch.uint8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32))
def test_qweight_is_the_bit_stream_of_each_row(bits: int, out: int, runs: int, seed: int) -> None:
    codes = random_codes(out, 32 * runs, bits, seed)
    packed = pack_codes(codes, bits)
    words = pack_qweight(packed)
    assert words.dtype == torch.int32
    assert unsigned(words) == naive_words(codes.t(), bits)
    assert torch.equal(unpack_qweight(words), packed)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_qzeros_is_the_bit_stream_of_each_group(bits: int, groups: int, runs: int, seed: int) -> None:
    out = runs * {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    zero = random_codes(out, groups, bits, seed)
    words = pack_qzeros(zero, bits, "gptq_v2")
    assert unsigned(words.t()) == naive_words(zero, bits)
    assert torch.equal(unpack_qzeros(words, bits, "gptq_v2"), zero)


@pytest.mark.parametrize("bits", BITS)
def test_v1_stores_one_less(bits: int) -> None:
    zero = random_codes(64, 3, bits, 0, low=1)
    words = pack_qzeros(zero, bits, "gptq")
    assert torch.equal(words, pack_qzeros(zero - 1, bits, "gptq_v2"))
    assert torch.equal(unpack_qzeros(words, bits, "gptq"), zero)


def test_v1_has_no_place_for_zero() -> None:
    with pytest.raises(InputError, match=r"zero points: expected 1 or more in version gptq, got 0; write gptq_v2"):
        pack_qzeros(torch.zeros(8, 1, dtype=torch.uint8), 4, "gptq")


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_converts_between_versions_as_we_do(bits: int) -> None:
    """Every field, 2**bits - 1 in v1 too: GPTQModel's own conversion, then our v2, is our v1; and back."""
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    stored = torch.randint(-(2**31), 2**31, (5, 6 * bits), generator=torch.Generator().manual_seed(bits)).int()
    module = gptqmodel_linear(bits, 64, 6 * 32, FORMAT.GPTQ)
    module.qzeros = stored.clone()
    convert_gptq_v1_to_v2_format_module(module, bits=bits, pack_dtype=torch.int32)
    assert torch.equal(unpack_qzeros(module.qzeros, bits, "gptq_v2"), unpack_qzeros(stored, bits, "gptq"))

    module.qzeros = stored.clone()
    convert_gptq_v2_to_v1_format_module(module, quantize_config=QuantizeConfig(bits=bits, offload_to_disk=False))
    assert torch.equal(unpack_qzeros(module.qzeros, bits, "gptq"), unpack_qzeros(stored, bits, "gptq_v2"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_packs_the_same_words(bits: int) -> None:
    from gptqmodel.quantization import FORMAT

    out, columns, group = 64, 96, 32
    codes = random_codes(out, columns, bits, 1)
    zero = random_codes(out, columns // group, bits, 2)
    scale = torch.full((out, columns // group), 0.25)  # a power of two: no rounding in the packer's own division
    linear = torch.nn.Linear(columns, out, bias=False)
    index = torch.arange(columns) // group
    linear.weight.data = scale[:, index] * (codes.float() - zero[:, index].float())
    module = gptqmodel_linear(bits, columns, out, FORMAT.GPTQ_V2)
    module.pack_original(linear, scale, zero.float(), index.int())
    assert torch.equal(module.qweight, pack_qweight(pack_codes(codes, bits)))
    assert torch.equal(module.qzeros, pack_qzeros(zero, bits, "gptq_v2"))


def gptqmodel_linear(bits: int, columns: int, out: int, version: object):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=False, in_features=columns, out_features=out, format=version
    )


def test_shapes_and_dtypes_are_checked() -> None:
    with pytest.raises(InputError, match=r"packed codes: expected uint8 \[out, bytes\] in whole words"):
        pack_qweight(torch.zeros(2, 6, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"qweight: expected an int32 matrix, got torch.int64"):
        unpack_qweight(torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(FormatError, match=r"qzeros: expected an int32 matrix, got torch.float16"):
        unpack_qzeros(torch.zeros(2, 6, dtype=torch.float16), 4, "gptq")
    with pytest.raises(FormatError, match=r"rows of whole codes of 3 bits, got 4 words"):
        unpack_qzeros(torch.zeros(2, 4, dtype=torch.int32), 3, "gptq")
    with pytest.raises(InputError, match=r"a multiple of 32, got torch.uint8 \[48, 1\]"):
        pack_qzeros(torch.zeros(48, 1, dtype=torch.uint8), 3, "gptq_v2")
    with pytest.raises(InputError, match=r"bits: expected one of 2, 3, 4, 8, got 5"):
        pack_qzeros(torch.zeros(32, 1, dtype=torch.uint8), 5, "gptq_v2")
