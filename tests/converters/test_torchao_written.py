"""torchao folders of ours: every cell comes back bit for bit, and transformers opens them with torchao's tensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edges import edges
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import ExactnessError, FormatError, InputError
from qalora.formats.safetensors import read_header
from qalora.tensor import BITS, GroupQuantTensor
from qalora.testing import assert_parity, assert_same_model, assert_same_tensor, random_model, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao

TOKENS = [(7 * n) % 250 for n in range(24)]
LAYER = "model.layers.0.self_attn.q_proj"
EXACT = tuple(bits for bits in BITS if bits < 8)
"""The widths at which real zero points come back."""


def written(model: Checkpoint, out: Path, **options: Any) -> Path:
    export(model, ["torchao"], out, ExportOptions(**options))
    return out / "torchao"


@pytest.mark.pairs(bits=BITS, group_size=[16, 32, None], zeros=["real", "integer", "symmetric"])
def test_every_tensor_comes_back(
    tiny_untied: Path, tmp_path: Path, bits: int, group_size: int | None, zeros: Any
) -> None:
    if bits == 8 and zeros == "real":
        pytest.skip("a loss, which has a test of its own")
    model = random_model(load(tiny_untied), bits=bits, group_size=group_size, zeros=zeros)
    read = load(written(model, tmp_path))
    assert read.layout == "torchao" and read.linears == model.linears
    assert_same_model(read, model)
    assert {name: lazy.spec for name, lazy in read.tensors.items()} == {n: t.spec for n, t in model.tensors.items()}
    lazy = read.tensors[model.linears[0]]
    assert_same_tensor(lazy.rows(3, 50), lazy.load_quantized().rows(3, 50))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", EXACT)
def test_groups_at_the_edges_come_back_and_are_computed(bits: int, tiny_untied: Path, tmp_path: Path) -> None:
    model = random_model(load(tiny_untied), bits=bits, zeros="real", change=edges)
    folder = written(model, tmp_path)
    assert_same_model(load(folder), model)
    theirs = opened(folder)
    for name in model.linears:
        assert_near(theirs.get_parameter(name).dequantize(), model.tensors[name].load_quantized())


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_near(theirs: torch.Tensor, ours: GroupQuantTensor) -> None:
    """Within what torchao rounds: the zero point, code - zero, and their product, each once to float32.

    Each is at most 2**-24 of its size, which is no more than (2**b + |zero|) * |scale|; terms of 2**-48 are below the
    rounding of the bound itself, which the factor 4 instead of 3 covers.
    """
    scale = ours.scale.double()
    codes = ours.codes().view(*scale.shape, -1).double()
    exact = scale[..., None] * codes + ours.min.double()[..., None]
    size = scale.abs() * (1 << ours.bits) + ours.min.double().abs()
    off = (theirs.double().view(exact.shape) - exact).abs()
    assert bool((off <= 4 * 2.0**-24 * size[..., None]).all())


@pytest.mark.slow
@pytest.mark.parametrize("zeros", ["real", "integer"])
@pytest.mark.parametrize("bits", BITS)
def test_transformers_opens_it_with_torchaos_tensors(bits: int, zeros: Any, tmp_path: Path) -> None:
    """And they are no further from the model than their own rounding is; biases too."""
    base = load(tiny_llama(tmp_path / "m", config={"attention_bias": True, "tie_word_embeddings": False}))
    model = random_model(base, bits=bits, group_size=32, zeros=zeros)
    lossy = bits == 8 and zeros == "real"
    folder = written(model, tmp_path, allow_loss=frozenset({"minima"} if lossy else ()))
    theirs = opened(folder)
    for name in model.linears:
        weight = theirs.get_parameter(name)
        assert type(weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert weight.target_dtype is getattr(torch, f"int{bits + (zeros == 'real' and bits < 8)}")
        assert_near(weight.dequantize(), model.tensors[name].load_quantized())
    assert_parity(load(folder) if lossy else model, [folder], tokens=TOKENS)


@pytest.mark.slow
def test_layers_of_their_own_widths_in_shards(tiny_untied: Path, tmp_path: Path) -> None:
    base = load(tiny_untied)
    narrow, wide = (random_model(base, bits=bits, group_size=size) for bits, size in ((3, 16), (5, 64)))
    mixed = {name: (narrow if "mlp" in name else wide).tensors[name] for name in base.tensors}
    model = replace(narrow, tensors=mixed)
    folder = written(model, tmp_path, max_shard_size=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_model(load(folder), model)
    assert_parity(model, [folder], tokens=TOKENS)


def test_whole_zero_points_are_int8(tiny_untied: Path, tmp_path: Path) -> None:
    kinds = {"integer": (torch.float16, torch.int8), "real": (torch.float32, torch.float32)}
    for zeros, expected in kinds.items():
        folder = written(random_model(load(tiny_untied), zeros=zeros), tmp_path / zeros)  # type: ignore[arg-type]
        entries = read_header(folder / "model.safetensors").entries
        assert tuple(entries[f"{LAYER}._weight_{part}"].dtype for part in ("scale", "zero_point")) == expected


def test_the_files_are_those_of_the_plan(tiny: Path, tmp_path: Path) -> None:
    (plan,) = export(random_model(load(tiny), bits=3), ["torchao"], tmp_path)
    folder = tmp_path / "torchao"
    assert {path.name for path in folder.iterdir()} == set(plan.files)
    assert all((folder / name).stat().st_size == size for name, size in plan.files.items() if size is not None)


def test_the_config_is_one_that_transformers_makes(tiny: Path, tmp_path: Path) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    folder = written(random_model(load(tiny), zeros="integer"), tmp_path)
    kind, size = MappingType.ASYMMETRIC, PerGroup(32)
    theirs = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=size, mapping_type=kind)).to_dict()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["quantization_config"] == theirs


def test_what_float32_rounds_is_a_loss_by_name(tiny_untied: Path, tmp_path: Path) -> None:
    """Float32 minima; and at 8 bits all real ones. A zero point is rounded twice, and the minimum again."""
    exact = random_model(load(tiny_untied), bits=8)
    narrow = random_model(
        load(tiny_untied), min_dtype=torch.float32, change=lambda tensor: replace(tensor, min=tensor.min * 1.0001)
    )
    for model in (exact, narrow):
        with pytest.raises(ExactnessError, match="`allow_loss` minima"):
            written(model, tmp_path)
        read = load(written(model, tmp_path, allow_loss=frozenset({"minima"})))
        for name in model.linears:
            mine, theirs = read.tensors[name].load_quantized(), model.tensors[name].load_quantized()
            assert torch.equal(mine.packed, theirs.packed) and torch.equal(mine.scale, theirs.scale)
            size = theirs.min.abs() + (128 if model is exact else 0) * theirs.scale.abs()
            assert bool(((mine.min - theirs.min).abs() <= 2.0**-23 * size).all())
        (tmp_path / "torchao").rename(tmp_path / f"done-{model is exact}")


def test_what_is_refused(tiny_untied: Path, tmp_path: Path) -> None:
    base = load(tiny_untied)
    with pytest.raises(InputError, match="quantize the model first"):
        written(base, tmp_path)
    model = random_model(base)
    lazy = model.tensors[model.linears[0]]
    assert lazy.spec is not None
    ordered = replace(lazy, spec=replace(lazy.spec, act_order=True))
    with pytest.raises(ExactnessError, match="act-order"):
        written(replace(model, tensors={**model.tensors, lazy.name: ordered}), tmp_path)
    assert not (tmp_path / "torchao").exists()


def change(file: Path, tensors: dict[str, torch.Tensor], **said: str | None) -> None:
    """Other tensors, and other metadata, in a file."""
    with safe_open(file, "pt") as opened:
        metadata = {**opened.metadata(), **said}
    save_file(
        {**load_file(file), **tensors}, file, {key: value for key, value in metadata.items() if value is not None}
    )


def test_metadata_that_the_values_contradict(tiny_untied: Path, tmp_path: Path) -> None:
    folder = written(random_model(load(tiny_untied)), tmp_path)
    file, name = folder / "model.safetensors", f"{LAYER}._weight_zero_point"
    stored = load_file(file)[name]
    moved = stored.clone()
    moved[0, 0] = moved[0, 0] * 1.00001 + 0.00001
    change(file, {name: moved})
    with pytest.raises(FormatError, match=rf"{LAYER}\.weight: zero points: expected those of float16 minima"):
        load(folder).tensors[f"{LAYER}.weight"].load()
    change(file, {name: stored}, **{f"{LAYER}.weight": described_as(file, "int6")})
    with pytest.raises(FormatError, match=r"q_proj: qalora\.tensors: expected int6 in .* got int5 in groups"):
        load(folder)


def described_as(file: Path, kind: str) -> str:
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()[f"{LAYER}.weight"])
    said["_data"]["target_dtype"]["_data"] = kind
    return json.dumps(said)


def test_without_our_metadata_it_is_read_as_torchao_says(tiny_untied: Path, tmp_path: Path) -> None:
    """4-bit codes with real zero points are 5-bit ones then, 16 more; the weights are the same but for a rounding."""
    model = random_model(load(tiny_untied))
    folder = written(model, tmp_path)
    change(folder / "model.safetensors", {}, **{"qalora.tensors": None})
    read = load(folder)
    for name in model.linears:
        mine, theirs = model.tensors[name].load_quantized(), read.tensors[name].load_quantized()
        assert theirs.bits == 5 and torch.equal(mine.codes() + 16, theirs.codes())
        assert_near(theirs.dequantize(), mine)
