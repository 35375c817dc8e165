"""Layers seen one after another against the whole model run at once, for every family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from elsewhere import Elsewhere
from qalora.calibration.streaming import LinearLayer, by_layer, stream
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.converters import load
from qalora.converters.torch_module import build
from qalora.errors import InputError
from qalora.testing import TINY, tiny_model

WINDOWS = torch.arange(60).view(3, 20) * 7 % 250


def inputs_of(model: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every linear layer's input, of the whole model in one forward of all windows, computed in `dtype`."""
    module, found = build(model).to(dtype), {}

    def keep(name: str) -> object:
        def hook(part: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = given[0].reshape(-1, given[0].shape[-1]).double()

        return hook

    for name in model.linears:
        module.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep(name))
    with torch.no_grad():
        module(input_ids=WINDOWS, use_cache=False)
    return found


def assert_moments(seen: dict[str, Tensor], model: Checkpoint) -> None:
    """Those of float64, to four times the distance that the whole model in float32 has from it.

    An input that is d away moves x_i x_j by d (|x_i| + |x_j|) + d^2; a float32 sum of n products has an error of
    n 2^-24 times the sum of their magnitudes.
    """
    exact, single = inputs_of(model, torch.float64), inputs_of(model, torch.float32)
    assert set(seen) == set(exact)
    for name, x in exact.items():
        away = 4 * float((single[name] - x).abs().max())
        mean = x.abs().mean(dim=0)
        products = x.abs().t() @ x.abs() / len(x)
        slack = away * (mean[:, None] + mean[None, :]) + away**2 + len(x) * 2.0**-24 * products
        assert bool(((seen[name].double() - x.t() @ x / len(x)).abs() <= slack).all()), name


@pytest.mark.parametrize("family", TINY)
def test_it_sees_what_the_whole_model_computes(tmp_path: Path, family: str) -> None:
    model = load(tiny_model(tmp_path, family))
    seen: dict[str, Tensor] = {}
    ticks: list[int] = []

    def visit(layer: LinearLayer) -> None:
        assert torch.equal(layer.weight, model.tensors[layer.name].load_float().float())
        seen[layer.name] = layer.moments

    stream(model, WINDOWS, by_layer(visit), lambda: ticks.append(1))
    assert_moments(seen, model)
    assert len(ticks) == model.config["num_hidden_layers"]


def test_layers_are_computed_on_a_device_one_at_a_time(tmp_path: Path) -> None:
    """Gemma 2 caps its scores, so that no kernel of attention is chosen by device and every bit is the same."""
    model = load(tiny_model(tmp_path, "gemma2"))
    seen: list[dict[str, Tensor]] = [{}, {}]
    stream(model, WINDOWS, by_layer(lambda layer: seen[0].update({layer.name: layer.moments})))
    with Elsewhere("mps:0") as place:

        def visit(layer: LinearLayer) -> Tensor:
            assert {layer.weight.device, layer.moments.device} == {place.place}
            seen[1][layer.name] = layer.moments.cpu()
            return layer.weight

        stream(model, WINDOWS, by_layer(visit), device=place.place)
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert (place.there["addmm_"], place.here["addmm_"], place.here["embedding"]) == (len(seen[0]) // 7 * 4 * 3, 0, 3)


def test_later_layers_see_what_was_changed(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path, "llama"))
    seen: dict[str, Tensor] = {}

    def visit(layer: LinearLayer) -> Tensor:
        seen[layer.name] = layer.moments
        return layer.weight * 0.5

    stream(model, WINDOWS, by_layer(visit))
    halves = {name: model.tensors[name].load_float() * 0.5 for name in model.linears}
    tensors = {
        name: LazyTensor(name=name, shape=tuple(half.shape), dtype=half.dtype, read=lambda a, b, half=half: half[a:b])
        for name, half in halves.items()
    }
    assert_moments(seen, replace(model, tensors={**model.tensors, **tensors}))


def test_one_decoder_layer_is_held_at_a_time(tmp_path: Path) -> None:
    """Weights are read in the order of computation, each once, and none before its layer is reached."""
    model = load(tiny_model(tmp_path, "llama"))
    log: list[str] = []

    def logged(lazy: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> object:
            log.append(f"read {lazy.name.split('.')[2]}")
            return lazy.read(start, stop)

        return replace(lazy, read=read)

    tensors = {name: logged(lazy) if name in model.linears else lazy for name, lazy in model.tensors.items()}
    stream(
        replace(model, tensors=tensors),
        WINDOWS,
        by_layer(lambda layer: log.append(f"saw {layer.name.split('.')[2]}")),
    )
    assert log == ["read 0"] * 7 + ["saw 0"] * 7 + ["read 1"] * 7 + ["saw 1"] * 7


def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path, "llama"))
    with pytest.raises(InputError, match=r"the inputs of model\.layers\.0\.self_attn\.o_proj\.weight: expected finite"):
        stream(model, WINDOWS, by_layer(lambda layer: layer.weight * torch.inf if "v_proj" in layer.name else None))
