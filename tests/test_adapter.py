"""Adapters: conventions, exact rewriting, folders written and read back, and everything that is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.adapter import (
    ADAPTER_FILES,
    CONVENTIONS,
    Adapter,
    AdapterLayer,
    Convention,
    adapter_sizes,
    convention_factor,
    convert,
    read_adapter,
    repool,
    to_plain_lora,
    write_adapter,
)
from qalora.adapter.peft_config import check_work, parse_config
from qalora.checkpoint import Checkpoint, LazyTensor
from qalora.cli import main
from qalora.errors import AdapterError, FormatError, InputError
from qalora.testing import random_tensor

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (48, 96), DOWN: (32, 192)}


def _model(shapes: dict[str, tuple[int, int]] | None = None) -> Checkpoint:
    tensors = {}
    for module, shape in (shapes or SHAPES).items():
        tensor = random_tensor(*shape, bits=4, group_size=8)
        tensors[f"{module}.weight"] = LazyTensor(name=f"{module}.weight", shape=shape, read=tensor.rows)
    return Checkpoint(path=Path("base"), layout="qalora", config={}, tensors=tensors, linears=tuple(tensors))


def _layer(module: str, pool: int, *, rank: int = 4, factor: float = 0.25) -> AdapterLayer:
    rng = torch.Generator().manual_seed(len(module))
    out, columns = SHAPES[module]
    return AdapterLayer(
        a=torch.randn(rank, columns // pool, generator=rng),
        b=torch.randn(out, rank, generator=rng),
        pool_size=pool,
        scaling=factor,
        factor=factor,
    )


def _adapter(pools: tuple[int, int] = (32, 32), ranks: tuple[int, int] = (4, 4), factor: float = 0.25) -> Adapter:
    layers = {
        module: _layer(module, pool, rank=rank, factor=factor)
        for module, pool, rank in zip(SHAPES, pools, ranks, strict=True)
    }
    return Adapter(layers=layers, convention="paper", metadata={"task_type": "CAUSAL_LM"})


def _same(got: Adapter, expected: Adapter) -> None:
    """dW is the same: factor, B, and A repeated to every column, bit for bit."""
    assert set(got.layers) == set(expected.layers)
    for module, layer in got.layers.items():
        wanted = expected.layers[module]
        assert layer.factor == wanted.factor
        assert torch.equal(layer.b, wanted.b)
        assert torch.equal(
            layer.a.repeat_interleave(layer.pool_size, dim=1), wanted.a.repeat_interleave(wanted.pool_size, dim=1)
        )


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def _foreign(folder: Path, adapter: Adapter | None = None, **config: Any) -> Path:
    """A folder as another tool writes it: no record of ours, no word on the convention but what `config` says."""
    write_adapter(adapter or _adapter(), folder)
    (folder / "qalora_adapter.json").unlink()
    _edit(folder / "adapter_config.json", **{"r": 4, "lora_alpha": 16, "alpha_pattern": {}, **config})
    return folder


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    path.unlink()
    safetensors.torch.save_file(tensors, path)


@settings(max_examples=60, deadline=None)
@given(
    convention=st.sampled_from(CONVENTIONS),
    pools=st.sampled_from([(32, 32), (8, 8), (96, 192), (16, 48)]),
    ranks=st.sampled_from([(4, 4), (3, 7)]),
    factor=st.floats(1e-6, 1e6),
)
def test_written_in_any_convention_and_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    convention: Convention,
    pools: tuple[int, int],
    ranks: tuple[int, int],
    factor: float,
) -> None:
    ours = _adapter(pools, ranks, factor)
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(ours, folder, convention=convention)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == adapter_sizes(ours, convention=convention)
    for model in (None, _model()):
        read = read_adapter(folder, model)
        assert read.convention == convention
        _same(read, ours)
        for other in CONVENTIONS:  # and on, and back
            _same(convert(convert(read, other), convention), ours)
    _same(read_adapter(folder, convention=convention), ours)


@settings(max_examples=100, deadline=None)
@given(
    rank=st.integers(1, 80),
    alpha=st.integers(1, 256),
    pool=st.sampled_from([8, 32, 96]),
    source=st.sampled_from(CONVENTIONS),
    target=st.sampled_from(CONVENTIONS),
)
def test_alpha_alone_gives_the_factor(rank: int, alpha: int, pool: int, source: Convention, target: Convention) -> None:
    """Without our record a reader has alpha only: the factor it computes is a float64 neighbour at worst."""
    factor = convention_factor(source, alpha / rank, 96, pool)
    layer = _layer(Q, pool, rank=rank, factor=factor)
    (converted,) = convert(Adapter(layers={Q: layer}, convention=source), target).layers.values()
    again = convention_factor(target, converted.scaling, 96, pool)
    # the quotient's rounding and those of at most three steps after it
    assert abs(again - factor) <= 4 * math.ulp(factor)
    if source == target:
        assert converted.scaling == alpha / rank


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_factor_of_each_convention(tmp_path: Path, convention: Convention, rslora: bool) -> None:
    folder = _foreign(tmp_path / "a", use_rslora=rslora)
    read = read_adapter(folder, _model(), convention=convention)
    s = 16 / math.sqrt(4) if rslora else 16 / 4
    expected = {"paper": (s, s), "official": (s / 32, s / 32), "peft": (s * 3 / 32, s * 6 / 32)}[convention]
    assert (read.layers[Q].factor, read.layers[DOWN].factor) == expected
    assert {layer.scaling for layer in read.layers.values()} == {s}
    _same(convert(read, "paper"), read)


def test_an_unknown_convention_is_asked_for_with_what_each_would_mean(tmp_path: Path) -> None:
    folder = _foreign(tmp_path / "a")
    with pytest.raises(
        AdapterError, match=r"4 \(paper\), 0\.125 \(official\), 0\.75 \(peft\); give `convention`"
    ) as info:
        read_adapter(folder, _model())
    assert "in = 192" in str(info.value)
    with pytest.raises(AdapterError, match="give the model"):
        read_adapter(folder, convention="paper")


def test_peft_says_its_convention_with_the_flag(tmp_path: Path) -> None:
    folder = _foreign(tmp_path / "a", use_qalora=True, qalora_group_size=32)
    for read in (read_adapter(folder), read_adapter(folder, _model()), read_adapter(folder, convention="peft")):
        assert (read.convention, read.layers[Q].factor) == ("peft", 4 * 3 / 32)
    with pytest.raises(AdapterError, match="expected peft, as use_qalora says, got paper"):
        read_adapter(folder, convention="paper")
    _edit(folder / "adapter_config.json", qalora_group_size=16)
    with pytest.raises(AdapterError, match=r"expected in/16 = 12 columns, as its files say, got 6"):
        read_adapter(folder, _model())
    _edit(folder / "adapter_config.json", qalora_group_size=1)
    with pytest.raises(AdapterError, match="means two factors"):
        read_adapter(folder)


@pytest.mark.parametrize("flag", [False, True])
def test_an_ordinary_lora_is_told_by_its_shape(tmp_path: Path, flag: bool) -> None:
    folder = _foreign(tmp_path / "a", to_plain_lora(_adapter()), use_qalora=flag)
    read = read_adapter(folder, _model())
    assert read.convention == "paper"
    assert {(layer.pool_size, layer.factor) for layer in read.layers.values()} == {(1, 4.0)}


def test_a_plain_lora_is_the_same_adapter(tmp_path: Path) -> None:
    ours = _adapter((32, 16), (4, 3), factor=1 / 3)
    plain = to_plain_lora(convert(ours, "official"))
    _same(plain, ours)
    write_adapter(plain, tmp_path / "plain")
    read = read_adapter(tmp_path / "plain", _model())
    _same(read, ours)
    assert {layer.pool_size for layer in read.layers.values()} == {1}
    assert {layer.scaling for layer in read.layers.values()} == {1 / 3}
    assert "use_qalora" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text(encoding="utf-8"))
    with pytest.raises(AdapterError, match="a common divisor above 1"):
        write_adapter(plain, tmp_path / "peft", convention="peft")
    assert not (tmp_path / "peft").exists()


def test_pools_are_split_and_never_joined() -> None:
    layer = _layer(Q, 32)
    split = repool(layer, 16)
    assert torch.equal(split.a[:, ::2], layer.a)
    assert torch.equal(split.a[:, 1::2], layer.a)
    for size in (64, 12, 0):
        with pytest.raises(AdapterError, match="a divisor of 32"):
            repool(layer, size)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    ours = _adapter((32, 16), (4, 3), factor=1 / 3)
    for name in ("a", "b"):
        write_adapter(ours, tmp_path / name)
    for name in ADAPTER_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_the_file_says_beside_is_carried_along(tmp_path: Path) -> None:
    said = {
        "base_model_name_or_path": "some/model",
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    ours = Adapter(layers=_adapter().layers, convention="paper", minima="float32", metadata=said)
    write_adapter(ours, tmp_path / "a")
    read = read_adapter(tmp_path / "a")
    assert (dict(read.metadata), read.minima) == (said, "float32")
    write_adapter(read, tmp_path / "b")
    assert (tmp_path / "b" / "adapter_config.json").read_bytes() == (
        tmp_path / "a" / "adapter_config.json"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["", ".default"])
def test_sixteen_bits_widen_exactly_and_names_may_hold_the_adapters(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = _foreign(tmp_path / "a")
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    _rewrite(folder, lambda t: {k.replace(".weight", f"{name}.weight"): v.to(dtype) for k, v in t.items()})
    read = read_adapter(folder, _model(), convention="paper")
    assert torch.equal(read.layers[Q].a, stored[f"base_model.model.{Q}.lora_A.weight"].to(dtype).float())


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, "expected LORA, got 'ADALORA'"),
    ({"use_dora": True}, "use_dora is set"),
    ({"bias": "some"}, "bias: expected none or all or lora_only, got 'some'"),
    ({"modules_to_save": 1}, "modules_to_save: expected a list of names, got 1"),
    ({"trainable_token_indices": [1, 1]}, "expected token ids, each once"),
    ({"lora_bias": True}, "lora_bias is set"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
    ({"r": 8}, r"expected the rank of adapter_config.json, 8, got \[4, "),
    ({"r": 0}, "r: expected a whole number from 1, got 0"),
    ({"r": True}, "r: expected a whole number from 1, got true"),
    ({"lora_alpha": "16"}, "lora_alpha: expected a number"),
    ({"lora_alpha": math.inf}, "lora_alpha: expected a number, got inf"),
    ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
    ({"rank_pattern": [4]}, "rank_pattern: expected an object"),
    ({"rank_pattern": {"q_proj": 3}}, "expected the rank of adapter_config.json, 3"),
    ({"alpha_pattern": {"(a+)+b": 3}}, "none of them of a group"),
    ({"alpha_pattern": {"(a|a)" * 17: 3}}, "none of them of a group"),
    ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    ({"rank_pattern": {"a*a*a*a*b": 2}}, "and 3 repetitions, none of them of a group"),
    ({"alpha_pattern": {f"x{n}": 1 for n in range(10_001)}}, "alpha_pattern: expected at most 10000 expressions"),
    ({"alpha_pattern": {f".*.*.*{n}": 1 for n in range(5000)}}, "rank_pattern and alpha_pattern: expected"),
    ({"alpha_pattern": {"(a|a)" * 8 + f".*.*{n}": 1 for n in range(99)}}, "that match in 100000000 steps"),
    ({"target_modules": {"q_proj": 1}}, "target_modules: expected text or numbers"),
    ({"base_model_name_or_path": "\ud800"}, r"expected text or numbers, got '.ud800'"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES, ids=lambda value: str(value)[:40])
def test_a_config_that_means_something_else_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    folder = _foreign(tmp_path / "a", **change)
    with pytest.raises(AdapterError, match=sentence):
        read_adapter(folder, _model(), convention="paper")


def test_patterns_as_peft_writes_them_are_read() -> None:
    """A name for each module of a large decoder, as EVA writes them, and expressions by hand."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    modules = [f"model.layers.{layer}.{kind}" for layer in range(126) for kind in kinds]
    hand = [
        r".*layers\.0\..*",
        r"^model.layers.\d+.self_attn.(q|k|v|o)_proj",
        "k_proj|v_proj",
        ".*layers.1[0-9].*attn.*",
    ]
    hand += [rf"model\.layers\.({'|'.join(map(str, range(12)))})\..*(gate|up|down)_proj"]
    for patterns in (modules, hand):
        values = dict.fromkeys(patterns, 2)
        config = {"peft_type": "LORA", "rank_pattern": values, "alpha_pattern": values}
        check_work(parse_config(config, "config"), modules, "config")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for n, text in enumerate(("{", "[]", '{"r": 1, "r": 2}', "[" * 100_000, "\xff")):
        folder = _foreign(tmp_path / str(n))
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(FormatError, match=r"adapter_config\.json"):
            read_adapter(folder)
    with pytest.raises(InputError, match=r"an adapter's folder .* got nothing"):
        read_adapter(tmp_path / "missing")
    nested = tmp_path / "outer"
    _foreign(nested / "adapter_model")
    with pytest.raises(FormatError, match=r"give .*outer.adapter_model"):
        read_adapter(nested)


def test_tensors_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    a, b = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = [
        (lambda t: {**t, "lora_magnitude_vector": torch.ones(2)}, "tensor 'lora_magnitude_vector'"),
        (lambda t: {**t, a.replace("base_model.model.", ""): t[a].clone()}, "once for each module"),
        (lambda t: {k: v for k, v in t.items() if k != b}, f"{Q}: expected lora_A and lora_B, got lora_A alone"),
        (lambda t: {**t, a: t[a].double()}, "a float32, float16 or bfloat16 matrix, got torch.float64"),
        (lambda t: {**t, a: t[a][0]}, "matrix"),
        (lambda t: {**t, a: t[a][:, :0].contiguous()}, "matrix"),
        (lambda t: {**t, b: t[b][:, :2].contiguous()}, "the same rank"),
        (lambda t: {**t, b: t[b] * math.nan}, f"lora_B of {Q}: expected finite values"),
        (lambda t: {**t, a: t[a] * math.inf}, f"lora_A of {Q}: expected finite values"),
        (lambda t: {}, "expected lora_A and lora_B tensors, got none"),
    ]
    for n, (change, sentence) in enumerate(cases):
        folder = _foreign(tmp_path / str(n))
        _rewrite(folder, change)
        with pytest.raises(AdapterError, match=sentence):
            read_adapter(folder, _model(), convention="paper")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = _foreign(tmp_path / "a")
    with pytest.raises(AdapterError, match=rf"{DOWN} \(1 of 2 are not in the model\).*different model"):
        read_adapter(folder, _model({Q: SHAPES[Q]}), convention="paper")
    for shape in ((48, 88), (40, 96)):
        with pytest.raises(AdapterError, match=rf"{Q}: expected .* for \[out, in\] = \[{shape[0]}, {shape[1]}\], got"):
            read_adapter(folder, _model({**SHAPES, Q: shape}), convention="paper")


def test_our_record_is_checked(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"version": 2}, "version: expected 1, got 2; update qalora"),
        ({"convention": "mine"}, "convention: expected paper or official or peft, got 'mine'"),
        ({"minima": "bfloat16"}, "minima: expected float16 or float32, got 'bfloat16'"),
        ({"layers": {}}, "layers: expected the layers of"),
        ({"layers": {Q: 1, DOWN: 2}}, "expected an object, got 1"),
        (
            {"layers": {m: {"pool_size": 0, "factor": 1.0} for m in SHAPES}},
            "expected a whole number from 1, got 0",
        ),
        (
            {"layers": {m: {"pool_size": 32, "factor": math.nan} for m in SHAPES}},
            "expected a finite number, got nan",
        ),
        ({"layers": {m: {"pool_size": 32, "factor": 0.2500001} for m in SHAPES}}, "undo the change"),
        ({"layers": {m: {"pool_size": 16, "factor": 0.25} for m in SHAPES}}, "as its files say"),
    ]
    for n, (change, sentence) in enumerate(changes):
        write_adapter(_adapter(), tmp_path / str(n))
        _edit(tmp_path / str(n) / "qalora_adapter.json", **change)
        with pytest.raises(InputError, match=sentence):
            read_adapter(tmp_path / str(n), _model())
    write_adapter(_adapter(), tmp_path / "good")
    with pytest.raises(AdapterError, match=r"expected paper, as qalora_adapter.json says, got peft"):
        read_adapter(tmp_path / "good", convention="peft")


def test_a_pickle_is_refused_with_the_tool_that_converts_it(tmp_path: Path) -> None:
    folder = _foreign(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(FormatError, match=r"a pickle.*tools/convert_pickle\.py"):
            read_adapter(path, _model())


def test_convert_on_the_command_line(tmp_path: Path) -> None:
    ours = _adapter((32, 32), factor=1 / 3)
    write_adapter(ours, tmp_path / "a")
    for form in ("peft", "official", "paper", "plain"):
        arguments = ["adapter", "convert", str(tmp_path / "a"), "--to", form, "-o", str(tmp_path / form)]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        assert f"2 layers, rank 4: paper to {form}" in done.output
        assert "note:" not in done.output
        _same(read_adapter(tmp_path / form, _model()), ours)
        again = CliRunner().invoke(main, arguments)
        assert again.exit_code == 2
        assert "exists already" in again.stderr
        assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0
    foreign = _foreign(tmp_path / "foreign", use_qalora=True, qalora_group_size=32)  # the factor grows with in
    done = CliRunner().invoke(main, ["adapter", "convert", str(foreign), "--to", "official", "-o", str(tmp_path / "b")])
    assert "note: its layers differ in alpha" in done.output


def test_convert_needs_what_the_file_does_not_say(tmp_path: Path) -> None:
    foreign = _foreign(tmp_path / "foreign")
    arguments = ["adapter", "convert", str(foreign), "--to", "plain", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "give the model" in done.stderr
    assert not (tmp_path / "out").exists()
