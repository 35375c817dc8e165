"""GPTQ -> GGUF -> MLX -> ONNX -> OpenVINO -> transformers.js -> HQQ -> GPTQ: every code, scale and min comes back.

A cell is a width, a group size and a kind of zero point. A format that the design's table does not call exact for a
cell has to refuse it, and the trip goes on without that format. Between the two stands Q8_0, which holds integer zero
points by shifting the codes: the same weights, by a test of its own.
"""

from pathlib import Path
from typing import Literal

import pytest
import torch

from qalora.checkpoint import Checkpoint
from qalora.converters import load, onnx
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import InputError
from qalora.parity.weights import compare_tensors
from qalora.tensor import BITS
from qalora.testing import assert_same_model, random_model, tiny_llama

TRIP = ("gptq", "gguf", "mlx", "onnx", "openvino", "transformersjs", "hqq", "gptq")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 32}
Zeros = Literal["real", "integer", "symmetric"]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(tiny_llama(tmp_path_factory.mktemp("floats"), config=SIZES))


def carrier(form: str, bits: int, group_size: int, zeros: Zeros) -> Literal["exact", "shifted", "refused"]:
    """The design's table."""
    exact = form in ("onnx", "openvino", "transformersjs", "hqq") or group_size % 32 == 0
    if form == "gptq":
        exact = bits in (2, 3, 4, 8)
    elif form == "gguf" and zeros == "integer":
        return "shifted" if exact and bits == 6 else "refused"
    elif form == "gguf" and zeros == "real":
        exact = exact and bits <= 5
    return "exact" if exact else "refused"


def there_and_back(form: str, model: Checkpoint, folder: Path, options: ExportOptions | None = None) -> Checkpoint:
    export(model, [form], folder, options)
    place = folder / form
    if form == "onnx":
        return onnx.read(place)
    return load(next(place.glob("*.gguf")) if form == "gguf" else place)


@pytest.mark.pairs(bits=BITS, group_size=[16, 32, 64, 128, 256], zeros=["real", "integer", "symmetric"])
def test_round_trip(bits: int, group_size: int, zeros: Zeros, floats: Checkpoint, tmp_path: Path) -> None:
    model = random_model(
        floats,
        bits=bits,
        group_size=group_size,
        zeros=zeros,
        min_dtype=torch.float32 if zeros == "integer" else torch.float16,
    )
    here = model
    for n, form in enumerate(TRIP):
        place = tmp_path / str(n)
        held = carrier(form, bits, group_size, zeros)
        if held == "shifted":
            continue
        if held == "refused":
            with pytest.raises(InputError):
                export(here, [form], place)
            assert not place.exists()
            continue
        here = there_and_back(form, here, place)
        assert_same_model(here, model)
        kinds = {lazy.spec.zeros for lazy in here.tensors.values() if lazy.spec is not None}
        assert kinds == {"real" if zeros == "real" else "integer"}


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_integer_zeros_in_q8_0(bits: int, group_size: int, floats: Checkpoint, tmp_path: Path) -> None:
    """Codes are stored relative to their zero points there: shifted, in their own groups, and the same weights."""
    model = random_model(floats, bits=bits, group_size=group_size, zeros="integer")
    read = there_and_back("gguf", model, tmp_path, ExportOptions(gguf_form="wide"))
    for name in model.linears:
        mine, theirs = read.tensors[name].load_quantized(), model.tensors[name].load_quantized()
        assert (mine.bits, mine.group_size) == (8, group_size)
        assert compare_tensors(name, mine.rows(1, 256), theirs.rows(1, 256)).same  # row 0 has scale 0: no shift shows
        assert mine.dequantize().equal(theirs.dequantize())
