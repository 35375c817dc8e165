"""Minima that are fitted, against numpy's least squares; and rounding that feeds its errors back."""

import numpy as np
import pytest
import torch

from qalora.errors import InputError
from qalora.quantization.gptq import output_error
from qalora.quantization.minima import fit_minima, pooled_covariance, round_with_feedback
from qalora.quantization.rounding import quantize_tensor
from qalora.tensor import holds_float16


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [12, 64] and inputs [500, 64] that depend on one another."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 64, generator=rng) @ torch.randn(64, 64, generator=rng) / 8 + 0.2
    return torch.randn(12, 64, generator=rng) * 0.05, x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_fit_is_least_squares(bits: int) -> None:
    """The same minima as numpy's lstsq on the pooled inputs themselves, to a float16 ULP."""
    w, x = data()
    tensor = quantize_tensor(w, bits=bits, group_size=16)
    got = fit_minima(tensor, w, (x.t() @ x / len(x)).double(), ridge=1e-12)
    pooled = x.double().view(len(x), 4, 16).sum(dim=2).numpy()
    missing = x.double().numpy() @ (w - tensor.dequantize()).double().numpy().T
    change, *_ = np.linalg.lstsq(pooled, missing, rcond=None)
    wanted = tensor.min.double().numpy() + change.T
    ulp = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64)
    assert bool((np.abs(got.min.double().numpy() - wanted) <= ulp * 1.01).all())
    assert torch.equal(got.packed, tensor.packed)
    assert torch.equal(got.scale, tensor.scale)
    assert holds_float16(got.min)


def test_the_fit_helps_on_the_inputs() -> None:
    w, x = data()
    h = x.t() @ x / len(x)
    tensor = quantize_tensor(w, bits=2, group_size=16)
    fitted = fit_minima(tensor, w, h)
    assert output_error(w, fitted.dequantize(), h) < 0.95 * output_error(w, tensor.dequantize(), h)


def test_minima_that_float16_does_not_reach_are_refused() -> None:
    w, x = data()
    h = x.t() @ x / len(x)
    with pytest.raises(InputError, match=r"fitted minima: expected .* float16 reaches, got .*leave out `fit_minima`"):
        fit_minima(quantize_tensor(w, bits=4, group_size=16), w + 1e5, h)


def test_inputs_that_were_never_seen_change_nothing() -> None:
    w, _ = data()
    tensor = quantize_tensor(w, bits=4, group_size=16)
    assert torch.equal(fit_minima(tensor, w, torch.zeros(64, 64)).min, tensor.min)


def test_the_pooled_covariance_is_that_of_pooled_inputs() -> None:
    """To what float64 sums of 500 products and of 256 moments, and of 16 inputs twice, may differ by."""
    x = data()[1].double()
    pooled, most = (part.view(500, 4, 16).sum(dim=2) for part in (x, x.abs()))
    slack = (500 + 256 + 500 + 2 * 16) * 2.0**-53 * (most.t() @ most)
    assert bool(((pooled_covariance(x.t() @ x, 16) - pooled.t() @ pooled).abs() <= slack).all())


def test_feedback_rounds_to_a_neighbour_and_helps() -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(400, 24, generator=rng, dtype=torch.float64) * 0.1 + torch.randn(400, 1, generator=rng).double()
    covariance = x.t() @ x / 400
    values = torch.randn(200, 24, generator=rng, dtype=torch.float64)
    values[0] = values[0].half().double()
    values[1, :3] = torch.tensor([0.0, 2.0**-25, -(2.0**-26)])
    got = round_with_feedback(values, covariance)
    assert holds_float16(got)
    assert torch.equal(got[0], values[0].float())
    ulp = torch.from_numpy(np.spacing(np.abs(values.numpy()).astype(np.float16)).astype(np.float64))
    assert bool(((got.double() - values).abs() <= ulp).all())

    def error(rounded: torch.Tensor) -> float:
        left = rounded.double() - values
        return float(((left @ covariance) * left).sum())

    assert error(got) < 0.2 * error(values.half())


def test_feedback_without_correlation_is_rounding_to_nearest() -> None:
    values = torch.randn(50, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(round_with_feedback(values, torch.eye(8).double()), values.half().float())
