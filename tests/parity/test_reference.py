"""The reference's forwards against transformers' own model, the fold, and slow loops."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elsewhere import Elsewhere
from qalora.adapter import AdapterLayer
from qalora.checkpoint import cache_bytes, with_cached_weights, with_last_weight
from qalora.folding import fold
from qalora.parity.foldcheck import FoldCheck, FoldChecker, compare_adapters
from qalora.parity.logit_cache import LogitCache
from qalora.parity.reference import Forward, Reference, exact_minima, rounded_minima
from qalora.testing import assert_same_tensor, random_tensor

TOKENS = list(range(3, 40))
NOISE = 16 * 2.0**-24
"""Float32 sums of 64 and 128 terms in two layers, in whatever order a kernel takes."""


def transformers_model(folder: Path, model):
    """transformers' float model with the linear weights of a quantized one."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    for name in model.linears:
        module.get_parameter(name).data = model.tensors[name].load_float()
    return module


@torch.inference_mode()
def logits_of(module) -> torch.Tensor:
    return module(input_ids=torch.tensor([TOKENS])).logits[0]


@pytest.fixture(scope="module")
def reference(base, adapter) -> Reference:
    return Reference(base, adapter)


def test_base_is_transformers_with_the_dequantized_weights(reference, base, tiny) -> None:
    expected = logits_of(transformers_model(tiny, base))
    torch.testing.assert_close(
        reference.logits(TOKENS, Forward()), expected, rtol=0, atol=NOISE * float(expected.max())
    )


@pytest.mark.parametrize("minima", ["float16", "float32"])
def test_rounded_is_the_fold(reference, base, adapter, tiny, minima) -> None:
    expected = logits_of(transformers_model(tiny, fold(base, adapter, minima=minima)))
    found = reference.logits(TOKENS, Forward(weights=minima))
    torch.testing.assert_close(found, expected, rtol=0, atol=NOISE * float(expected.max()))


@pytest.mark.parametrize("weights", ["base", "side", "float16"])
def test_on_another_device_it_computes_the_same(reference, base, adapter, weights) -> None:
    """Attention has another kernel there, and sums in another order."""
    expected = reference.logits(TOKENS, Forward(weights=weights))
    with Elsewhere("mps:0") as place:
        other = Reference(base, adapter, device=place.place)
        found, layers = other.logits(TOKENS, Forward(weights=weights)), other.layers(TOKENS, Forward(weights=weights))
    torch.testing.assert_close(found, expected, rtol=0, atol=NOISE * float(expected.abs().max()))
    assert {found.device.type, *(one.device.type for one in layers)} == {"cpu"}
    assert place.there["mm"]
    assert not place.here["mm"] or weights == "float16"  # the fold's B @ A


def test_side_is_the_side_branch_with_the_matrices_of_the_adapter(reference, base, adapter, tiny) -> None:
    module = transformers_model(tiny, base).double()
    for path, layer in adapter.layers.items():
        change = layer.factor * (layer.b.double() @ layer.a.double())
        module.get_parameter(f"{path}.weight").data += change.repeat_interleave(layer.pool_size, dim=1)
    expected = logits_of(module).float()
    found = reference.logits(TOKENS, Forward(weights="side"))
    torch.testing.assert_close(found, expected, rtol=0, atol=NOISE * float(expected.max()))
    assert float((found - reference.logits(TOKENS, Forward())).abs().max()) > 1e-2


@pytest.mark.parametrize(("pool", "group"), [(32, 32), (64, 32), (16, 32), (128, 64)])
@pytest.mark.parametrize("minima", ["float16", "float32"])
def test_minima_are_rounded_once_whatever_the_pool(pool: int, group: int, minima) -> None:
    tensor = random_tensor(8, 128, bits=4, group_size=group)
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 128 // pool, generator=rng), 0.01 * torch.randn(8, 3, generator=rng)
    layer = AdapterLayer(a=a, b=b, pool_size=pool, scaling=0.7, factor=0.7)
    found = rounded_minima(tensor, layer, minima).dequantize()
    codes, dtype = tensor.codes().numpy(), np.float16 if minima == "float16" else np.float32
    for o in range(8):
        for i in range(128):
            whole = float(tensor.min[o, i // group]) + 0.7 * float(
                sum(float(b[o, r]) * float(a[r, i // pool]) for r in range(3))
            )
            kept = np.float32(dtype(whole))
            product = np.float32(tensor.scale[o, i // group].item()) * np.float32(codes[o, i])
            assert float(found[o, i]) == product + kept


def test_noise_is_float32s(reference, tmp_path: Path) -> None:
    noise = LogitCache(reference, [TOKENS], tmp_path).noise(Forward())
    assert 0 < noise.rms < noise.max < 1e-4
    assert noise.bound >= noise.floor > 0


def test_a_spool_computes_each_forward_once(reference, tmp_path: Path) -> None:
    cache = LogitCache(reference, [TOKENS[:20], TOKENS[20:]], tmp_path)
    first = cache.logits(Forward(), 1)
    assert torch.equal(cache.logits(Forward(), 1), first)
    assert len(list(tmp_path.iterdir())) == 2  # both windows fit into one batch
    alone = reference.logits(TOKENS[:20], Forward())
    bound = NOISE * float(alone.abs().max())
    torch.testing.assert_close(cache.logits(Forward(), 0), alone, rtol=0, atol=bound)
    assert len(list(tmp_path.iterdir())) == 2
    assert cache.distance(Forward(), Forward()) == 0.0
    assert cache.distance(Forward(), Forward(weights="side")) > 0
    assert cache.logit_count == len(TOKENS) * first.shape[1]


def test_weights_are_read_once_where_they_fit(base) -> None:
    """And are what they were; where they do not fit, the model is what it was."""
    name, reads = base.linears[0], []
    lazy = base.tensors[name]

    def read(start: int, stop: int):
        reads.append((start, stop))
        return lazy.read(start, stop)

    counted = replace(base, tensors={**base.tensors, name: replace(lazy, read=read)})
    kept = with_cached_weights(counted, cache_bytes(base))
    part, whole = kept.tensors[name].rows(8, 24), kept.tensors[name].load()
    assert_same_tensor(part, lazy.load_quantized().rows(8, 24))
    assert_same_tensor(whole, lazy.load_quantized())
    assert reads == [(0, lazy.shape[0])]
    assert with_cached_weights(counted, cache_bytes(base) - 1) is counted


def test_the_weight_that_was_read_last_is_kept(base) -> None:
    reads: list[str] = []

    def counted(name: str):
        def read(start: int, stop: int):
            reads.append(name)
            return base.tensors[name].read(start, stop)

        return replace(base.tensors[name], read=read)

    first, second, *_ = base.linears
    tensors = {**base.tensors, first: counted(first), second: counted(second)}
    kept = with_last_weight(replace(base, tensors=tensors))
    for name, part in ((first, (0, 8)), (first, (8, 24)), (second, (8, 16)), (second, (0, 8)), (first, (8, 24))):
        assert_same_tensor(kept.tensors[name].rows(*part), base.tensors[name].load_quantized().rows(*part))
    assert reads == [first, second, first]


def check_fold(base, folded, adapter) -> FoldCheck:
    """Some rows at a time."""
    checker = FoldChecker(adapter, "float16")
    for path, layer in adapter.layers.items():
        before, after = (model.tensors[f"{path}.weight"].load_quantized() for model in (base, folded))
        for start in range(0, before.shape[0], 24):
            stop = min(start + 24, before.shape[0])
            rows = before.rows(start, stop)
            part = replace(layer, b=layer.b[start:stop])
            checker.add(path, rows, after.rows(start, stop), exact_minima(rows, part))
    return checker.result()


def test_the_fold_passes_its_check_and_a_wrong_one_does_not(base, adapter, folded) -> None:
    checked = check_fold(base, folded, adapter)
    assert (checked.codes_differ, checked.min_beyond, checked.first) == (0, 0, "")
    assert checked.groups == sum(math.prod(base.tensors[name].shape) // 32 for name in base.linears)
    doubled = {path: replace(layer, factor=2 * layer.factor) for path, layer in adapter.layers.items()}
    wrong = check_fold(base, fold(base, replace(adapter, layers=doubled)), adapter)
    assert wrong.min_beyond > checked.groups / 2 and wrong.first == base.linears[0]
    whole = check_fold(base, fold(base, adapter, minima="float32"), adapter)
    assert whole.min_beyond > checked.groups / 2  # minima that float16 does not hold


def test_adapters_are_compared_by_what_they_add(adapter) -> None:
    from qalora.adapter import to_plain_lora

    assert compare_adapters(adapter, adapter) == ()
    assert compare_adapters(to_plain_lora(adapter), adapter) == ()
    path = next(iter(adapter.layers))
    wrong = {**adapter.layers, path: replace(adapter.layers[path], factor=2.001)}
    assert compare_adapters(replace(adapter, layers=wrong), adapter) == (path,)
    del wrong[path]
    assert compare_adapters(replace(adapter, layers=wrong), adapter) == (path,)
