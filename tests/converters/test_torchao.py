"""torchao folders, made by torchao and transformers, against torchao's own dequantization; and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from packed import by_torchao, put
from qalora.converters import load
from qalora.converters.torchao import read
from qalora.errors import FormatError
from qalora.inspection import inspect
from qalora.tensor import BITS
from qalora.testing import assert_same_tensor

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.pairs(
    bits=BITS, group_size=[16, 32, -1], symmetric=[True, False], dtype=[torch.float16, torch.bfloat16], tied=[0, 1]
)
def test_what_torchao_makes(
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    tied: int,
    tiny: Path,
    tiny_untied: Path,
    tmp_path: Path,
) -> None:
    """scale * (code - zero) of 16-bit scales is exact in float32, so that one rounding gives theirs."""
    source = tiny if tied else tiny_untied
    made = tmp_path / "packed"
    theirs = by_torchao(source, made, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    model = load(made)
    assert model.layout == "torchao" and set(model.linears) <= set(theirs)
    assert {name for name, lazy in model.tensors.items() if lazy.spec is not None} == set(theirs)
    for name, weight in theirs.items():
        assert torch.equal(model.tensors[name].load_float().to(dtype), weight), name
    lazy = model.tensors[f"{Q_PROJ}.weight"]
    assert_same_tensor(lazy.rows(5, 12), lazy.load_quantized().rows(5, 12))


@pytest.fixture(scope="module")
def packed(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 bits in groups of 32, in float32, about zero; it is everybody's."""
    folder = tmp_path_factory.mktemp("packed") / "torchao"
    by_torchao(tiny_untied, folder, dtype=torch.float32, moved=False)
    return folder


def copied(
    packed: Path,
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    described: Callable[[Any], object] = lambda said: None,
) -> Path:
    """A copy with other tensors, or with another description of the first layer."""
    folder.mkdir()
    for path in packed.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    with safe_open(packed / "model.safetensors", "pt") as file:
        metadata = dict(file.metadata())
    said = json.loads(metadata[f"{Q_PROJ}.weight"])
    described(said)
    metadata[f"{Q_PROJ}.weight"] = json.dumps(said)
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def test_real_zero_points(packed: Path, tmp_path: Path) -> None:
    """Minima are -scale * zero, rounded once; torchao itself rounds code - zero, and the product."""
    name = f"{Q_PROJ}._weight_zero_point"
    shift = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    folder = copied(packed, tmp_path / "real", lambda tensors: tensors.update({name: tensors[name].float() + shift}))
    stored = load_file(folder / "model.safetensors")
    lazy = load(folder).tensors[f"{Q_PROJ}.weight"]
    tensor = lazy.load_quantized()
    assert lazy.spec is not None and lazy.spec.zeros == "real"
    scale, zero = stored[f"{Q_PROJ}._weight_scale"], stored[name]
    assert torch.equal(tensor.min, -(scale.double() * (zero.double() + 8)).float())
    codes = stored[f"{Q_PROJ}._weight_qdata"].view(64, 2, 32).double()
    exact = (codes - zero.double()[..., None]) * scale.double()[..., None]
    ulp = 2.0**-23 * (16 + zero.abs().max()) * scale.abs().max()  # of the product, of the minimum and of their sum
    assert float((tensor.dequantize().double() - exact.view(64, 64)).abs().max()) <= 1.5 * float(ulp)


def test_zero_points_off_by_one_are_seen(packed: Path, tmp_path: Path) -> None:
    def lower(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("zero_point")]:
            tensors[name] = (tensors[name] - 1).clamp(min=-8)

    seen = [
        {one.code for one in inspect(place).warnings} for place in (packed, copied(packed, tmp_path / "low", lower))
    ]
    assert ["zeros-off-by-one" in codes for codes in seen] == [False, True]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another type": (
        {"described": lambda said: said.update(_type="Float8Tensor")},
        r"type: expected Intx.* got 'Float8",
    ),
    "quantized activations": (
        {"described": lambda said: said["_data"].update(activation_quantization="int8_asym_per_token")},
        r"activation_quantization: quantized activations",
    ),
    "7 bits": (
        {"described": lambda said: said["_data"]["target_dtype"].update(_data="int7")},
        r"target_dtype: expected one of int2, .*, got 'int7'",
    ),
    "blocks of rows": (
        {"described": lambda said: said["_data"].update(block_size=[2, 32])},
        r"block_size: expected 1 row, and columns, got \[2, 32\]",
    ),
    "other groups": (
        {"described": lambda said: said["_data"].update(block_size=[1, 16])},
        r"_weight_scale: expected float16 \[64, 4\], got float32 \[64, 2\]",
    ),
    "no scales": ({"change": put(f"{Q_PROJ}._weight_scale", None)}, r"q_proj: missing tensor _weight_scale"),
    "bytes of another type": (
        {"change": put(f"{Q_PROJ}._weight_qdata", torch.zeros(64, 64, dtype=torch.uint8))},
        r"_weight_qdata: expected an int8 matrix, got torch\.uint8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, packed: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(FormatError, match=message):
        read(copied(packed, tmp_path / "changed", **changes))


def test_codes_beyond_their_width(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path / "wide", lambda tensors: tensors[f"{Q_PROJ}._weight_qdata"].fill_(8))
    with pytest.raises(
        FormatError, match=r"q_proj\.weight: _weight_qdata: expected values of 4 bits, got values beyond"
    ):
        read(folder).tensors[f"{Q_PROJ}.weight"].load()
