"""Quantizing on another device: where each operand lies, and what a GPU gives."""

import pytest
import torch
from torch import Tensor

from elsewhere import Elsewhere
from qalora.devices import find_device
from qalora.errors import InputError
from qalora.quantization import ZEROS, QuantizeOptions, quantize_weight
from qalora.quantization.minima import next_float16
from qalora.testing import assert_same_tensor

PLACES = ["mps:0", "xla:0"]
"""Without float64, and with it."""

CHOICES = [
    *({"method": method, "zeros": zeros} for method in ("rtn", "clip", "hqq") for zeros in ZEROS),
    {"method": "hqq", "fit_minima": True},
    {"method": "gptq", "bits": 3},
    {"method": "gptq", "bits": 2, "zeros": "integer", "act_order": True},
]


def layer(out: int = 8, columns: int = 64) -> tuple[Tensor, Tensor]:
    """A weight, and the moments of inputs that depend on one another."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, columns, generator=rng) @ torch.randn(columns, columns, generator=rng) + 0.3
    return torch.randn(out, columns, generator=rng) * 0.05, x.t() @ x / len(x)


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    x = torch.arange(6.0).view(2, 3)
    wanted = x @ x.t() * 2
    with Elsewhere("mps:0") as place:
        there = x.to(place.place)
        assert there.device == torch.device("mps:0")
        assert torch.equal((there @ there.t() * torch.tensor(2.0)).cpu(), wanted)
        with pytest.raises(AssertionError, match="one on the CPU"):
            _ = there + x
        with pytest.raises(AssertionError, match="mps has no float64"):
            there.double()
        assert (place.there["mm"], place.here["mm"]) == (1, 0)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_every_method_computes_where_the_weight_is(chosen: dict[str, object], name: str) -> None:
    """No operand on the wrong device; the loop over the columns there, and only what needs float64 on the CPU."""
    (w, h), options = layer(), QuantizeOptions(group_size=16, **chosen)  # type: ignore[arg-type]
    with Elsewhere(name) as place:
        made = quantize_weight(w.to(place.place), options, h.to(place.place))
        assert {part.device for part in (made.packed, made.scale, made.min)} == {place.place}
        here = set(place.here)
        back = made.to(torch.device("cpu"))
    assert_same_tensor(back, quantize_weight(w, options, h))
    if chosen["method"] == "gptq":
        assert place.there["addr_"] >= w.shape[1]
    if name.startswith("xla"):
        assert here <= {"_to_copy"}


def test_the_next_float16_is_torch_s() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every)]
    for up in (False, True):
        wanted = torch.nextafter(every, torch.full_like(every, torch.inf if up else -torch.inf))
        assert torch.equal(next_float16(every, up=up).view(torch.int16), wanted.view(torch.int16))


def test_a_device_that_holds_no_values_is_refused() -> None:
    with pytest.raises(InputError, match="device: expected a device that torch has here, got 'meta'"):
        find_device("meta", float64=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("zeros", ZEROS)
def test_a_gpu_rounds_to_the_same_bits(zeros: str) -> None:
    w, options = torch.randn(512, 1024) * 0.05, QuantizeOptions(zeros=zeros)  # type: ignore[arg-type]
    assert_same_tensor(quantize_weight(w.cuda(), options).to(torch.device("cpu")), quantize_weight(w, options))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["clip", "hqq", "gptq"])
def test_a_gpu_differs_in_ties_alone(method: str) -> None:
    """Float32 noise is some 1e-6 of weights of 0.05, and steps are 4e-3 or more: of 128 codes of a row, each falls so
    near to a tie with 5e-4 at most. So one row in 16 is expected to differ at the very most.
    """
    (w, h), options = layer(256, 128), QuantizeOptions(method=method)  # type: ignore[arg-type]
    here, there = quantize_weight(w, options, h), quantize_weight(w.cuda(), options, h.cuda()).to(torch.device("cpu"))
    same = (here.codes() == there.codes()).all(dim=1)
    assert int((~same).sum()) <= 16
