"""HQQ folders: every cell comes back bit for bit, hqq's own layers load them, and hqq's own are read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.safetensors import read_header
from qalora.quantization import quantize
from qalora.tensor import BITS
from qalora.testing import assert_parity, assert_same_model, assert_same_tensor, lazily, random_model, tiny_llama

TOKENS = [(7 * n) % 250 for n in range(24)]
LAYER = "model.layers.0.self_attn.q_proj"


def written(model: Checkpoint, out: Path, **options: Any) -> Path:
    export(model, ["hqq"], out, ExportOptions(**options))
    return out / "hqq"


@pytest.mark.pairs(bits=BITS, group_size=[16, 32, None], zeros=["real", "integer", "symmetric"])
def test_every_tensor_comes_back(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, zeros: Any
) -> None:
    model = random_model(load(tiny_untied), bits=bits, group_size=group_size, zeros=zeros)
    read = load(written(model, tmp_path))
    assert read.layout == "hqq" and read.linears == model.linears
    assert_same_model(read, model)
    assert {name: lazy.spec for name, lazy in read.tensors.items()} == {n: t.spec for n, t in model.tensors.items()}
    lazy = read.tensors[model.linears[0]]
    assert_same_tensor(lazy.rows(3, 50), lazy.load_quantized().rows(3, 50))  # type: ignore[arg-type]


def test_the_files_are_those_of_the_plan(tiny: Path, tmp_path: Path) -> None:
    (plan,) = export(quantize(load(tiny), bits=3, group_size=64), ["hqq"], tmp_path)
    folder = tmp_path / "hqq"
    assert {path.name for path in folder.iterdir()} == set(plan.files)
    assert all((folder / name).stat().st_size == size for name, size in plan.files.items() if size is not None)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["quant_method"] == "hqq"
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 3
    assert config["quant_config"]["weight_quant_params"]["group_size"] == 64


def test_whole_zero_points_are_float16(tiny_untied: Path, tmp_path: Path) -> None:
    for zeros, dtype in (("integer", torch.float16), ("real", torch.float32)):
        folder = written(random_model(load(tiny_untied), zeros=zeros), tmp_path / zeros)  # type: ignore[arg-type]
        entries = read_header(folder / "model.safetensors").entries
        assert (entries[f"{LAYER}.zero"].dtype, entries[f"{LAYER}.zero"].shape) == (dtype, (128, 1))


def test_float32_minima_are_a_loss_by_name(tiny_untied: Path, tmp_path: Path) -> None:
    model = random_model(
        load(tiny_untied), min_dtype=torch.float32, change=lambda tensor: replace(tensor, min=tensor.min * 1.0001)
    )
    with pytest.raises(ExactnessError, match="`allow_loss` minima"):
        written(model, tmp_path)
    read = load(written(model, tmp_path, allow_loss=frozenset({"minima"})))
    for name in model.linears:
        mine, theirs = read.tensors[name].load_quantized(), model.tensors[name].load_quantized()
        assert torch.equal(mine.packed, theirs.packed) and torch.equal(mine.scale, theirs.scale)
        assert bool(((mine.min - theirs.min).abs() <= 2.0**-23 * theirs.min.abs()).all())


def test_what_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    base = load(tiny_untied)
    with pytest.raises(InputError, match="quantize the model first"):
        written(base, tmp_path)
    model = quantize(base, group_size=32)
    lazy = model.tensors[model.linears[0]]
    assert lazy.spec is not None
    ordered = replace(lazy, spec=replace(lazy.spec, act_order=True))
    with pytest.raises(ExactnessError, match="act-order"):
        written(replace(model, tensors={**model.tensors, lazy.name: ordered}), tmp_path)
    assert not (tmp_path / "hqq").exists()


def test_metadata_that_the_values_contradict(tiny_untied: Path, tmp_path: Path) -> None:
    file = written(random_model(load(tiny_untied)), tmp_path) / "model.safetensors"
    tensors, metadata = safetensors.torch.load_file(file), dict(read_header(file).metadata)
    tensors[f"{LAYER}.zero"][7] *= 1.00001
    safetensors.torch.save_file(tensors, file, metadata=metadata)
    with pytest.raises(FormatError, match=f"{LAYER}.weight: zero points: expected those of float16 minima"):
        load(tmp_path / "hqq").tensors[f"{LAYER}.weight"].load()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zeros", ["real", "integer"])
@pytest.mark.parametrize("bits", BITS)
def test_hqq_computes_the_same(bits: int, zeros: Any, tmp_path: Path) -> None:
    """Its layers load their tensors; no further from torch than summing in another order is. Biases too."""
    pytest.importorskip("hqq", reason="pip install 'qalora[hqq]'")
    base = load(tiny_llama(tmp_path / "m", config={"attention_bias": True, "tie_word_embeddings": False}))
    model = random_model(base, bits=bits, group_size=32, zeros=zeros)
    assert_parity(model, [written(model, tmp_path)], tokens=TOKENS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_hqq_saves_is_read(bits: int, dtype: torch.dtype, tiny_untied: Path, tmp_path: Path) -> None:
    """A folder of HQQLinear.state_dict(), as transformers 4 saves it; and on to our own, bit for bit."""
    hqq = pytest.importorskip("hqq.core.quantize", reason="pip install 'qalora[hqq]'")
    base = load(tiny_untied)
    state, expected = {}, {}
    for name, lazy in base.tensors.items():
        if name not in base.linears:
            state[name] = lazy.load_float()
            continue
        linear = torch.nn.Linear(*reversed(lazy.shape), bias=False)
        linear.weight = torch.nn.Parameter(lazy.load_float().clone())
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        made = hqq.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
        module = name.removesuffix(".weight")
        state |= {f"{module}.{key}": value.contiguous() for key, value in made.state_dict().items()}
        made.meta["compute_dtype"] = torch.float32
        made.meta["scale"], made.meta["zero"] = made.meta["scale"].float(), made.meta["zero"].float()
        expected[name] = made.dequantize()
    folder = tmp_path / "theirs"
    folder.mkdir()
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**base.config, "quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = load(folder)
    for name, weight in expected.items():
        tensor = model.tensors[name].load_quantized()
        assert (tensor.bits, tensor.group_size) == (bits, 64)
        size = float(tensor.scale.abs().max()) * (1 << bits) + float(tensor.min.abs().max())
        assert float((tensor.dequantize() - weight).abs().max()) <= 2.0**-22 * size
    export(model, ["qalora"], tmp_path)
    assert_same_model(load(tmp_path / "qalora"), model)


def _damaged(folder: Path, key: str, value: torch.Tensor | None) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("axis", torch.tensor(0), "axis: expected 1, got 0; this kind of layer is not supported"),
        ("quant_zero", torch.tensor(1, dtype=torch.uint8), "quant_zero: expected 0, got 1"),
        ("nbits", torch.tensor(1), "expected nbits among 2, 3, 4, 5, 6, 8"),
        ("nbits", torch.tensor(3), "W_q: expected torch.int32"),
        ("group_size", torch.tensor(48), "group_size: expected a divisor of 64, got 48"),
        ("shape", torch.tensor([64]), "a group_size and a shape"),
        ("shape", torch.tensor([-64, 64]), "a group_size and a shape"),
        ("shape", torch.tensor([1 << 40, 64]), "group_size: expected a divisor"),
        ("nbits", torch.tensor(4.0), "nbits: expected whole numbers, got torch.float32"),
        ("packing", None, ""),
        ("zero", None, f"missing tensor {LAYER}.zero"),
        ("shape", None, f"missing tensor {LAYER}.shape"),
        ("scale", torch.zeros(128), "scale: expected torch.float16"),
    ],
)
def test_damage_is_named(part: str, value: torch.Tensor | None, words: str, tiny_untied: Path, tmp_path: Path) -> None:
    folder = written(quantize(load(tiny_untied), bits=4, group_size=32), tmp_path)
    _damaged(folder, f"{LAYER}.{part}", value)
    if not words:  # the width says the packing
        load(folder)
        return
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert words in str(caught.value) and LAYER in str(caught.value)


@pytest.mark.parametrize(
    ("part", "words"), [("zero", "zero points: expected finite values"), ("scale", "scale: expected finite")]
)
def test_infinity_is_named(part: str, words: str, tiny_untied: Path, tmp_path: Path) -> None:
    folder = written(quantize(load(tiny_untied), bits=4, group_size=32), tmp_path)
    _damaged(folder, f"{LAYER}.{part}", torch.full((128, 1), torch.inf))
    with pytest.raises(FormatError, match=rf"{LAYER}\.weight: {words}"):
        load(folder).tensors[f"{LAYER}.weight"].load()


def test_a_pickle_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    folder = written(quantize(load(tiny_untied)), tmp_path)
    (folder / "model.safetensors").rename(folder / "qmodel.pt")
    with pytest.raises(FormatError, match=r"qmodel\.pt: a pickle"):
        load(folder)


def test_a_quantized_output_layer_is_decoded(tiny_untied: Path, tmp_path: Path) -> None:
    model = quantize(load(tiny_untied))
    name = "lm_head.weight"
    table = random_model(load(tiny_untied), bits=8).tensors[model.linears[0]].load_quantized()
    head = lazily(
        name,
        replace(table, packed=table.packed.repeat(4, 1), scale=table.scale.repeat(4, 1), min=table.min.repeat(4, 1)),
    )
    read = load(written(replace(model, tensors={**model.tensors, name: head}), tmp_path))
    assert read.tensors[name].dtype == torch.float32
    assert torch.equal(read.tensors[name].load_float(), head.load_float())
