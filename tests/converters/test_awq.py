"""AWQ folders, made by GPTQModel's and auto-round's own layers, against their own dequantization; and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packed import by_auto_round, by_gptqmodel_awq, change_config, copied, put, say
from qalora.converters import load
from qalora.converters.awq import read
from qalora.errors import FormatError
from qalora.formats.awq import unpack_words
from qalora.inspection import inspect
from qalora.tensor import BITS
from qalora.testing import assert_same_tensor, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # of what transformers and GPTQModel import

Q_PROJ = "model.layers.0.self_attn.q_proj"


def assert_theirs(folder: Path, theirs: dict[str, torch.Tensor]) -> None:
    """scale * (code - zero) of float16 scales is exact in float32, so that one rounding gives theirs."""
    model = load(folder)
    assert {name for name, lazy in model.tensors.items() if lazy.spec is not None} == set(theirs)
    for name, weight in theirs.items():
        assert torch.equal(model.tensors[name].load_float().half(), weight), name


@pytest.mark.pairs(bits=BITS, group_size=[16, 32, -1], tied=[0, 1])
def test_what_gptqmodel_packs(bits: int, group_size: int, tied: int, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "float", config={"tie_word_embeddings": bool(tied)})
    theirs = by_gptqmodel_awq(source, tmp_path / "awq", bits=bits, group_size=group_size)
    assert_theirs(tmp_path / "awq", theirs)
    model = load(tmp_path / "awq")
    assert (model.layout, "lm_head.weight" in theirs, model.notes) == ("awq", not tied, ())


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_auto_round_exports_as_awq(bits: int, symmetric: bool, tiny_untied: Path, tmp_path: Path) -> None:
    """Interleaved at every width."""
    theirs = by_auto_round(tiny_untied, tmp_path / "awq", "auto_awq", bits=bits, symmetric=symmetric)
    assert_theirs(tmp_path / "awq", theirs)


@pytest.fixture(scope="module")
def packed(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 bits in groups of 32; it is everybody's."""
    folder = tmp_path_factory.mktemp("packed") / "awq"
    by_gptqmodel_awq(tiny_untied, folder, moved=False)
    return folder


def test_a_config_as_autoawq_writes_it(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path / "awq", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    said = {"bits": 4, "group_size": 32, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
    said |= {"zero_point": True, "do_fuse": False, "exllama_config": {"version": 2}, "backend": "autoawq"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    lazy = load(folder).tensors[f"{Q_PROJ}.weight"]
    assert_same_tensor(lazy.load_quantized(), load(packed).tensors[f"{Q_PROJ}.weight"].load_quantized())
    assert_same_tensor(lazy.rows(5, 12), lazy.load_quantized().rows(5, 12))


def test_zero_points_off_by_one_are_seen(packed: Path, tmp_path: Path) -> None:
    """As if they had been stored minus one, as GPTQ's are; no field of these is 0, so that none borrows."""

    def lower(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            assert int(unpack_words(tensors[name], tensors[name].shape[1] * 8, 4, interleaved=True).min()) > 0
            tensors[name] -= 0x11111111

    lowered = copied(packed, tmp_path / "lower", lower)
    seen = [{one.code for one in inspect(place).warnings} for place in (packed, lowered)]
    assert ["zeros-off-by-one" in codes for codes in seen] == [False, True]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "gemv": (say(version="gemv"), r"version: expected gemm, got 'gemv'; start from the float model"),
    "llm-awq": (say(format="llm-awq"), r"format: expected gemm, got 'llm-awq'"),
    "rules": (say(dynamic={"+:.*up": {"bits": 8}}), r"dynamic: rules for single layers"),
    "another width": (say(bits=8), r"lm_head\.qweight: expected int32 \[64, 64\] at 8 bits, got int32 \[64, 32\]"),
    "a width of nobody": (say(bits=8, meta={}), r"bits: expected 4, or a meta.quantizer that names GPTQModel"),
    "7 bits": (say(bits=7), r"bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
    "other groups": (say(group_size=16), r"scales: expected 4 groups of 16 in 64 columns, got 2"),
    "no group size": (say(group_size=0), r"group_size: expected -1 or a whole number from 1, got 0"),
    "words that are left out": (say(modules_to_not_convert=["q_proj"]), r"modules_to_not_convert leaves out .*q_proj"),
    "a block that is left out": (say(modules_to_not_convert=["model.layers.1"]), r"leaves out model\.layers\.1\."),
    "an expression": (say(modules_to_not_convert=["(a+)+"]), r"'\(a\+\)\+': an expression with repeated groups"),
    "quantized activations": (say(act_bits=8), r"act_bits: quantized activations"),
    "rotated weights": (say(rotation_config={"a": 1}), r"rotation_config: weights that were rotated"),
    "floats": (say(data_type="mx_fp"), r"data_type: expected int, got 'mx_fp'"),
    "an unknown key": (say(outliers=3), r"quantization_config says 'outliers', which is not known here: got 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, packed: Path, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    folder = copied(packed, tmp_path / "changed", lambda tensors: None)
    change_config(folder, change)
    with pytest.raises(FormatError, match=message):
        read(folder)


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scales": (put(f"{Q_PROJ}.scales", None), r"q_proj: missing tensor scales"),
    "an order": (put(f"{Q_PROJ}.g_idx", torch.zeros(64, dtype=torch.int32)), r"q_proj\.g_idx: a tensor that is not"),
    "float zero points": (
        put(f"{Q_PROJ}.qzeros", torch.zeros(2, 8)),
        r"qzeros: expected int32 \[2, 8\] at 4 bits, got float32 \[2, 8\]",
    ),
    "a vector of words": (
        put(f"{Q_PROJ}.qweight", torch.zeros(8, dtype=torch.int32)),
        r"q_proj: expected words of rows in eights at 4 bits, got qweight \[8\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_a_sentence(damage: str, packed: Path, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(FormatError, match=message):
        read(copied(packed, tmp_path / "damaged", change))
