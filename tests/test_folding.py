"""The fold against an obvious loop, numpy's rounding, and itself under other thread counts; what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.adapter import Adapter, AdapterLayer, write_adapter
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.cli import main
from qalora.converters import load
from qalora.errors import AdapterError, InputError
from qalora.folding import Minima, _round_to_float16, fold, fold_tensor, folded_minima, prove_fold
from qalora.quantization.rounding import spec_of
from qalora.tensor import BITS, GroupQuantTensor
from qalora.testing import assert_same_tensor, random_adapter, random_tensor


def _layer(out: int, columns: int, pool: int, *, rank: int = 3, factor: float = 0.3, seed: int = 0) -> AdapterLayer:
    rng = torch.Generator().manual_seed(seed)
    return AdapterLayer(
        a=torch.randn(rank, columns // pool, generator=rng),
        b=torch.randn(out, rank, generator=rng) * 0.01,
        pool_size=pool,
        scaling=factor,
        factor=factor,
    )


def _model(tensors: dict[str, GroupQuantTensor]) -> Checkpoint:
    def lazy(name: str, tensor: GroupQuantTensor) -> LazyTensor:
        spec = replace(spec_of(tensor.bits, tensor.group_size, "real"), act_order=tensor.g_idx is not None)
        return LazyTensor(name=name, shape=tensor.shape, spec=spec, read=tensor.rows)

    made = {f"{module}.weight": lazy(f"{module}.weight", tensor) for module, tensor in tensors.items()}
    return Checkpoint(path=Path("base"), layout="qalora", config={}, tensors=made, linears=tuple(made))


def _exact_weight(tensor: GroupQuantTensor, layer: AdapterLayer, row: int, column: int) -> Fraction:
    """scale * code + min + factor * sum_j B[row, j] * A[j, column // pool], in rational numbers."""
    group = column // tensor.group_size
    scale, minimum = (Fraction(float(value[row, group])) for value in (tensor.scale, tensor.min))
    pooled = column // layer.pool_size
    terms = (Fraction(float(layer.b[row, j])) * Fraction(float(layer.a[j, pooled])) for j in range(layer.rank))
    return scale * int(tensor.codes()[row, column]) + minimum + Fraction(layer.factor) * sum(terms)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from((16, 32, 64, 128)),
    pool=st.sampled_from((2, 8, 16, 32, 64, 128)),
    minima=st.sampled_from(("float16", "float32")),
    seed=st.integers(0, 2**16),
)
def test_the_folded_weight_is_the_sum(bits: int, group: int, pool: int, minima: Minima, seed: int) -> None:
    tensor = random_tensor(5, 128, bits=bits, group_size=group, seed=seed)
    layer = _layer(5, 128, pool, seed=seed)
    folded = fold_tensor(tensor, layer, minima)
    assert folded.packed is tensor.packed
    assert folded.group_size == min(group, pool)
    codes = folded.codes()
    size = tensor.regrouped(folded.group_size).min.abs() + layer.factor * torch.repeat_interleave(
        layer.b.abs() @ layer.a.abs(), max(1, pool // group), dim=1
    )
    spacing = np.spacing(np.abs(folded.min.numpy().astype(minima)))
    for row in range(5):
        for column in range(row % 2, 128, 4):
            k = column // folded.group_size
            scale, minimum = (Fraction(float(value[row, k])) for value in (folded.scale, folded.min))
            weight = scale * int(codes[row, column]) + minimum
            error = abs(weight - _exact_weight(tensor, layer, row, column))
            # half an ULP, and float64's own rounding of rank + 2 operations
            assert (
                error <= Fraction(float(spacing[row, k])) / 2 + (layer.rank + 2) * Fraction(float(size[row, k])) / 2**53
            )
    proof = prove_fold(tensor, layer, folded, minima)
    assert proof.exact
    assert 0 < proof.max_ulp < 0.51


def test_rounding_to_float16_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(200_000) * 10.0 ** rng.uniform(-11, 4.5, 200_000)).clip(-65_000, 65_000)
    half = rng.integers(0, 0x7BFF, 50_000).astype(np.uint16)
    ties = (half.view(np.float16).astype(np.float64) + (half + 1).astype(np.uint16).view(np.float16)) / 2
    near = [np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)]  # float32 on the way would round these twice
    every = np.concatenate([values, ties, *near, -ties, [0.0, 65504.0, 65519.99, 2**-25, 2**-26, 5e-324]])
    got = _round_to_float16(torch.from_numpy(every.copy()))
    assert np.array_equal(got.numpy(), every.astype(np.float16).astype(np.float64))
    assert np.array_equal(torch.from_numpy(ties).half().double().numpy(), ties.astype(np.float16).astype(np.float64))
    twice = torch.from_numpy(near[0]).float().half().double().numpy()
    assert not np.array_equal(twice, near[0].astype(np.float16).astype(np.float64))


@pytest.mark.parametrize("minima", ["float16", "float32"])
def test_the_arithmetic_is_the_one_that_is_written_down(minima: Minima) -> None:
    """Term by term in Python's own float64; and the same bits with another number of threads, and row by row."""
    tensor, layer = random_tensor(40, 256, bits=4, group_size=32), _layer(40, 256, 32, rank=19, factor=1 / 3)
    expected = torch.empty(40, 8, dtype=torch.float32)
    for o in range(40):
        for k in range(8):
            acc = 0.0
            for j in range(19):
                acc += float(layer.b[o, j]) * float(layer.a[j, k])
            value = np.float64(float(tensor.min[o, k]) + layer.factor * acc)
            expected[o, k] = float(np.float16(value) if minima == "float16" else np.float32(value))
    arguments = {"group_size": 32, "pool_size": 32, "minima": minima}
    whole = folded_minima(tensor.min, layer.a, layer.b, layer.factor, **arguments)  # type: ignore[arg-type]
    assert torch.equal(whole, expected)
    rows = [
        folded_minima(tensor.min[o : o + 1], layer.a, layer.b[o : o + 1], layer.factor, **arguments)  # type: ignore[arg-type]
        for o in range(40)
    ]
    assert torch.equal(torch.cat(rows), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = folded_minima(tensor.min, layer.a, layer.b, layer.factor, **arguments)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("minima", ["float16", "float32"])
def test_a_gpu_gives_the_same_bits(minima: Minima) -> None:
    tensor, layer = random_tensor(512, 1024, bits=4, group_size=32), _layer(512, 1024, 64, rank=16, factor=1 / 3)
    arguments = {"group_size": 32, "pool_size": 64, "minima": minima}
    here = folded_minima(tensor.min, layer.a, layer.b, layer.factor, **arguments)  # type: ignore[arg-type]
    there = folded_minima(tensor.min.cuda(), layer.a.cuda(), layer.b.cuda(), layer.factor, **arguments)  # type: ignore[arg-type]
    assert torch.equal(here, there.cpu())


def test_a_model_folds_lazily_and_by_rows() -> None:
    tensors = {name: random_tensor(24, 128, bits=4, group_size=32, seed=n) for n, name in enumerate("abc")}
    model = _model(tensors)
    layers = {"a": _layer(24, 128, 64, seed=1), "c": _layer(24, 128, 16, seed=2)}
    folded = fold(model, Adapter(layers=layers, convention="paper"))
    assert folded.tensors["b.weight"] is model.tensors["b.weight"]
    for module, layer in layers.items():
        lazy = folded.tensors[f"{module}.weight"]
        assert lazy.spec is not None
        assert (lazy.spec.zeros, lazy.spec.min_dtype, lazy.spec.group_size) == (
            "real",
            torch.float16,
            min(32, layer.pool_size),
        )
        expected = fold_tensor(tensors[module], layer, "float16")
        assert_same_tensor(lazy.load_quantized(), expected)
        rows = lazy.rows(7, 15)
        assert isinstance(rows, GroupQuantTensor)
        assert_same_tensor(rows, expected.rows(7, 15))


def test_minima_default_to_what_the_adapter_was_trained_with() -> None:
    model = _model({"a": random_tensor(8, 64, bits=4, group_size=32)})
    adapter = Adapter(layers={"a": _layer(8, 64, 32)}, convention="paper", minima="float32")
    for folded, dtype in ((fold(model, adapter), torch.float32), (fold(model, adapter, minima="float16"), torch.half)):
        assert folded.tensors["a.weight"].spec.min_dtype == dtype  # type: ignore[union-attr]


def test_act_order_is_refused_with_the_way_out() -> None:
    natural = random_tensor(8, 64, bits=4, group_size=32)
    tensor = replace(natural, g_idx=torch.arange(64, dtype=torch.int32) % 2)
    with pytest.raises(AdapterError, match=r"act-order.*--to plain"):
        fold_tensor(tensor, _layer(8, 64, 32), "float16")
    with pytest.raises(AdapterError, match=r"a\.weight.*act-order"):
        fold(_model({"a": tensor}), Adapter(layers={"a": _layer(8, 64, 32)}, convention="paper"))


@pytest.mark.parametrize(
    ("pool", "columns", "sentence"),
    [
        (1, 96, "ordinary LoRA"),
        (48, 96, r"divides the group size 32 or is a multiple of it, got 48"),
        (32, 64, r"expected \[out, in\] = \[8, 96\], got \[8, 64\]"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_anything_is_read(pool: int, columns: int, sentence: str) -> None:
    tensor, layer = random_tensor(8, 96, bits=4, group_size=32), _layer(8, columns, pool)
    with pytest.raises(AdapterError, match=sentence):
        fold_tensor(tensor, layer, "float16")
    with pytest.raises(AdapterError, match=sentence):
        fold(_model({"a": tensor}), Adapter(layers={"a": layer}, convention="paper"))


def test_a_minimum_out_of_reach_is_refused() -> None:
    tensor = random_tensor(8, 64, bits=4, group_size=32)
    for factor in (1e7, 1e300):
        with pytest.raises(AdapterError, match="float16 reaches"):
            fold_tensor(tensor, _layer(8, 64, 32, factor=factor), "float16")
    assert prove_fold(
        tensor,
        _layer(8, 64, 32, factor=1e7),
        fold_tensor(tensor, _layer(8, 64, 32, factor=1e7), "float32"),
        "float32",
    ).exact
    with pytest.raises(AdapterError, match="float32 reaches"):
        fold_tensor(tensor, _layer(8, 64, 32, factor=1e300), "float32")
    model = _model({"a": tensor})
    folded = fold(model, Adapter(layers={"a": _layer(8, 64, 32, factor=1e7)}, convention="paper"))
    with pytest.raises(AdapterError, match=r"a\.weight"):
        folded.tensors["a.weight"].load()


def test_a_float_model_and_an_unknown_module_are_refused() -> None:
    floats = LazyTensor(
        name="a.weight", shape=(8, 64), dtype=torch.float32, read=lambda start, stop: torch.zeros(8, 64)
    )
    model = Checkpoint(
        path=Path("base"), layout="huggingface", config={}, tensors={"a.weight": floats}, linears=("a.weight",)
    )
    adapter = Adapter(layers={"a": _layer(8, 64, 32)}, convention="paper")
    with pytest.raises(InputError, match="qalora quantize base"):
        fold(model, adapter)
    quantized = _model({"b": random_tensor(8, 64, bits=4, group_size=32)})
    with pytest.raises(AdapterError, match=r"a\.weight"):
        fold(quantized, adapter)
    mixed = replace(quantized, tensors={**quantized.tensors, "a.weight": floats})
    with pytest.raises(AdapterError, match=r"a\.weight holds floats"):
        fold(mixed, adapter)


def test_the_proof_can_fail() -> None:
    tensor, layer = random_tensor(8, 64, bits=4, group_size=32), _layer(8, 64, 32)
    folded = fold_tensor(tensor, layer, "float16")
    off = folded.min.clone()
    off[3, 1] = torch.from_numpy(np.nextafter(off[3].numpy().astype(np.float16), np.float16(math.inf)))[1]
    moved = prove_fold(tensor, layer, replace(folded, min=off))
    assert (moved.beyond, moved.exact) == (1, False)
    assert prove_fold(tensor, layer, fold_tensor(tensor, layer, "float32")).beyond > 8  # float16 does not hold those
    packed = folded.packed.clone()
    packed[0, 0] ^= 1
    assert prove_fold(tensor, layer, replace(folded, packed=packed)).codes_differ == 1
    assert prove_fold(tensor, layer, replace(folded, scale=folded.scale * 2)).scales_differ == 14  # one row is 0


def _adapter_of(model: Checkpoint, pool: int, *, minima: Minima | None = None) -> Adapter:
    return random_adapter(model, rank=3, pool_size=pool, a_size=1.0, b_size=0.01, minima=minima, scaling=0.3)


def test_the_command_folds_and_proves_what_it_wrote(tiny_untied: Path, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    made = CliRunner().invoke(main, ["quantize", str(tiny_untied), "-o", str(base), "--group-size", "32"])
    assert made.exit_code == 0, made.output
    model = load(base)
    write_adapter(_adapter_of(model, 32, minima="float32"), adapter)
    arguments = ["fold", str(base), str(adapter), "-o", str(out)]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not out.exists()
    for extra, minima in (["--json"], "float32"), (["--json", "--force", "--minima", "float16"], "float16"):
        done = CliRunner().invoke(main, [*arguments, *extra])
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert report["minima"] == minima
        assert set(report["layers"]) == {name.removesuffix(".weight") for name in model.linears}
        assert all(row["exact"] and row["codes_differ"] == 0 for row in report["layers"].values())
        expected = fold(model, _adapter_of(model, 32), minima=minima)
        for name in model.linears:
            assert_same_tensor(load(out).tensors[name].load_quantized(), expected.tensors[name].load_quantized())
    shown = CliRunner().invoke(main, [*arguments, "--force", "--minima", "float16"])
    assert "2 x q_proj" in shown.output
    assert "trained with float32 minima" in shown.output
    for place, sentence in ((out, "exists already"), (base, "apart from what is read")):
        refused = CliRunner().invoke(main, ["fold", str(base), str(adapter), "-o", str(place)])
        assert (refused.exit_code, sentence in refused.stderr) == (2, True)


@pytest.mark.slow
def test_a_real_model_folds_exactly(smollm2: Path) -> None:
    model = load(smollm2)
    adapter = _adapter_of(model, 32)
    folded = fold(model, adapter)
    proofs = [
        prove_fold(
            model.tensors[name].load_quantized(),
            adapter.layers[name.removesuffix(".weight")],
            folded.tensors[name].load_quantized(),
        )
        for name in model.linears
    ]
    assert len(proofs) == 210
    assert all(proof.exact for proof in proofs)
    assert sum(proof.groups for proof in proofs) == 3_317_760
