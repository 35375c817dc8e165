"""HQQ's packings against hqq itself, and minima through zero points."""

import pytest
import torch

from qalora.errors import FormatError, InputError
from qalora.formats.hqq import BITS, PACKINGS, pack_groups, unpack_groups
from qalora.formats.real_zeros import from_zeros, to_zeros
from qalora.testing import random_tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("bits", BITS)
def test_packing_is_hqqs(bits: int, group_size: int) -> None:
    quantizer = pytest.importorskip("hqq.core.quantize", reason="pip install 'qalora[hqq]'").Quantizer

    tensor = random_tensor(12, 128, bits=bits, group_size=group_size)
    codes, packed = tensor.codes(), pack_groups(tensor.packed, group_size, bits)
    theirs = quantizer.pack[PACKINGS[bits]](codes.reshape(-1, group_size))
    assert torch.equal(packed, theirs) and packed.dtype == theirs.dtype
    unpacked = quantizer.unpack[PACKINGS[bits]](packed)[: 12 * 128 // group_size]
    assert torch.equal(unpacked.reshape(12, 128), codes)
    assert torch.equal(unpack_groups(packed, (12, 128), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_float16_minima_come_back(bits: int) -> None:
    tensor = random_tensor(64, 256, bits=bits, group_size=32)  # row 0 has scale 0, and minima
    scale, zero = to_zeros(tensor.scale, tensor.min)
    back_scale, back_min = from_zeros(scale, zero)
    assert torch.equal(back_scale, tensor.scale)
    assert torch.equal(back_min.half().float(), tensor.min)
    codes = tensor.codes().view(64, 8, 32)
    weight = (codes - zero[..., None]) * scale[..., None]  # float32, as hqq computes it
    size = tensor.scale.abs()[..., None] * (1 << bits) + tensor.min.abs()[..., None]
    error = (weight - tensor.dequantize().view(64, 8, 32)).abs()
    assert bool((error <= 2.0**-22 * size).all())  # the zero point, the difference, the product: half an ULP each
    assert torch.equal(weight[0], tensor.min[0][:, None].expand(8, 32))


def test_extremes_come_back() -> None:
    """Float16's least and largest scale and min, in every pairing."""
    ends = torch.tensor([2.0**-24, 6e-5, 1e-3, 1.0, 65504.0]).half().float()
    scale, minimum = (part.reshape(1, -1) for part in torch.meshgrid(ends, torch.cat([-ends, ends]), indexing="ij"))
    back = from_zeros(*to_zeros(scale, minimum))
    assert torch.equal(back[0], scale) and torch.equal(back[1].half().float(), minimum)


def test_what_fills_no_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="groups: expected a multiple of 4 at 2 bits, got 3"):
        pack_groups(torch.zeros(3, 8, dtype=torch.uint8), 32, 2)
    with pytest.raises(FormatError, match="W_q: expected"):
        unpack_groups(torch.zeros(3, 32, dtype=torch.uint8), (4, 64), 4)
    with pytest.raises(FormatError, match="W_q: expected codes of 6 bits, got 64"):
        unpack_groups(torch.full((4, 32), 64, dtype=torch.uint8), (4, 32), 6)
    with pytest.raises(InputError, match="zero points: expected values in float32's range"):
        to_zeros(torch.tensor([[1e-38]]), torch.tensor([[65504.0]]))
