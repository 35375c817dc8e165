"""auto-round folders, made by its own exporters, against what its own layers make of them; and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packed import by_auto_round, change_config, copied, say
from qalora.converters import load
from qalora.converters.auto_round import read
from qalora.errors import FormatError, InputError
from qalora.formats.gptq import pack_qzeros, unpack_qzeros
from qalora.inspection import inspect
from qalora.tensor import BITS
from qalora.testing import assert_same_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of what transformers and auto-round import

Q_PROJ = "model.layers.0.self_attn.q_proj"
FORMS = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel")


def assert_theirs(folder: Path, theirs: dict[str, torch.Tensor]) -> None:
    """scale * (code - zero) of float16 scales is exact in float32, so that one rounding gives theirs."""
    model = load(folder)
    assert {name for name, lazy in model.tensors.items() if lazy.spec is not None} == set(theirs)
    for name, weight in theirs.items():
        assert torch.equal(model.tensors[name].load_float().half(), weight), name


@pytest.mark.pairs(form=FORMS, bits=BITS, group_size=[32, 64, -1], symmetric=[True, False])
def test_what_auto_round_exports(
    form: str, bits: int, group_size: int, symmetric: bool, tiny_untied: Path, tmp_path: Path
) -> None:
    theirs = by_auto_round(
        tiny_untied, tmp_path / "packed", form, bits=bits, group_size=group_size, symmetric=symmetric
    )
    assert_theirs(tmp_path / "packed", theirs)
    model = load(tmp_path / "packed")
    spec = model.tensors[f"{Q_PROJ}.weight"].spec
    assert spec is not None and spec.zero == (1 << (bits - 1) if symmetric else None)
    assert (model.layout, model.notes) == ("auto-round", ())
    report = inspect(tmp_path / "packed")
    assert {finding.code for finding in report.warnings} <= {"no-tokenizer"}


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_awqs_words(bits: int, tiny: Path, tmp_path: Path) -> None:
    theirs = by_auto_round(tiny, tmp_path / "packed", "auto_round:auto_awq", bits=bits)
    assert_theirs(tmp_path / "packed", theirs)
    assert load(tmp_path / "packed").layout == "auto-round"


@pytest.mark.parametrize("bits", BITS)
def test_what_it_exports_for_llm_compressor(bits: int, tiny_untied: Path, tmp_path: Path) -> None:
    """A compressed-tensors folder, with a width for each of its groups."""
    layers = {Q_PROJ: (8, 64), "model.layers.1.mlp.up_proj": (16, 32)}
    theirs = by_auto_round(tiny_untied, tmp_path / "packed", "llm_compressor", bits=bits, layers=layers)
    assert_theirs(tmp_path / "packed", theirs)
    assert load(tmp_path / "packed").layout == "compressed-tensors"


@pytest.mark.parametrize("form", ["auto_round:auto_gptq", "auto_round"])
def test_layers_of_their_own(form: str, tiny_untied: Path, tmp_path: Path) -> None:
    """Other widths and groups, floats, and the output layer."""
    layers = {"lm_head": (8, 32), Q_PROJ: (8, 64), "model.layers.1.mlp.up_proj": (16, 32)}
    layers |= {"model.layers.1.mlp.down_proj": (3, 32)}
    theirs = by_auto_round(tiny_untied, tmp_path / "packed", form, layers=layers)
    assert_theirs(tmp_path / "packed", theirs)
    specs = {
        name: lazy.spec and (lazy.spec.bits, lazy.spec.group_size)
        for name, lazy in load(tmp_path / "packed").tensors.items()
    }
    assert [specs[f"{name}.weight"] for name in layers] == [(8, 32), (8, 64), None, (3, 32)]


@pytest.fixture(scope="module")
def packed(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of 4 bits in groups of 32, about zero, in a packing, symmetric or not; it is everybody's."""
    root = tmp_path_factory.mktemp("packed")

    def made(form: str, *, symmetric: bool = False) -> Path:
        folder = root / f"{form.replace(':', '-')}-{symmetric}"
        if not folder.exists():
            by_auto_round(tiny_untied, folder, form, symmetric=symmetric, moved=False)
        return folder

    return made


# ---- zero points off by one


@pytest.mark.parametrize(("stored", "label"), [FORMS[:2], FORMS[1::-1]])
def test_symmetric_zeros_are_told_by_their_values(
    stored: str, label: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    plain = packed("auto_round:auto_gptq", symmetric=True)

    def raised(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            tensors[name] += 0x11111111 * (stored == "auto_round")

    folder = copied(plain, tmp_path / "packed", raised)
    change_config(folder, lambda said: said.update(packing_format=label))
    model = load(folder)
    assert_same_model(model, load(plain))
    wrong = f"labelled {label}, but its zero points, all symmetric, are those of {stored}; read as these"
    assert [wrong in note for note in model.notes] == [True]
    (found,) = [one for one in inspect(folder).warnings if one.code == "zeros-label"]
    assert f"stored as in {stored}" in found.message and f'"packing_format": "{stored}"' in found.todo


@pytest.mark.parametrize(("stored", "label", "right"), [(*FORMS[:2], "gptq_v2"), (*FORMS[1::-1], "gptq")])
def test_a_wrong_label_of_asymmetric_zeros_is_seen(
    stored: str, label: str, right: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    """No field of these is the highest, so that the wrong label can be read at all."""

    def no_highest(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            fields = unpack_qzeros(tensors[name], 4, "gptq_v2")
            tensors[name] = pack_qzeros(fields.clamp(max=14), 4, "gptq_v2")

    folder = copied(packed(stored), tmp_path / "packed", no_highest)
    good = load(folder)
    change_config(folder, lambda said: said.update(packing_format=label))
    assert "zeros-off-by-one" in {one.code for one in inspect(folder).warnings}
    assert_same_model(load(folder, checkpoint_format=right), good)
    assert "zeros-off-by-one" not in {one.code for one in inspect(folder, checkpoint_format=right).warnings}


def test_a_field_that_loaders_read_otherwise_is_refused(packed: Callable[..., Path], tmp_path: Path) -> None:
    def highest(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.qzeros"][0, 0] |= 15

    folder = copied(packed("auto_round:auto_gptq"), tmp_path / "packed", highest)
    with pytest.raises(FormatError, match=r"q_proj.*qzeros: expected values to 14, as stored minus one, got 15, over"):
        load(folder).tensors[f"{Q_PROJ}.weight"].load()


def test_no_packing_format(packed: Callable[..., Path], tmp_path: Path) -> None:
    """Minus one, as transformers takes it; with a note where the values do not tell."""
    for symmetric in (True, False):
        plain = packed("auto_round:auto_gptq", symmetric=symmetric)
        folder = copied(plain, tmp_path / str(symmetric), lambda tensors: None)
        change_config(folder, lambda said: said.pop("packing_format"))
        model = load(folder)
        assert_same_model(model, load(plain))
        assert ["no packing_format" in note for note in model.notes] == ([] if symmetric else [True])


def test_awqs_words_have_no_other_version(tiny: Path, tmp_path: Path) -> None:
    by_auto_round(tiny, tmp_path / "packed", "auto_round:auto_awq")
    with pytest.raises(InputError, match=r"`checkpoint_format` is for GPTQ's words, and .* has AWQ's; leave it out"):
        load(tmp_path / "packed", checkpoint_format="gptq")


# ---- what is refused


def extra(**layers: Any) -> Callable[[dict[str, Any]], None]:
    return say(extra_config={name.replace("__", "."): value for name, value in layers.items()})


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another packing": (
        say(packing_format="auto_round:llm_compressor"),
        r"packing_format: expected one of auto_round, .*, got 'auto_round:llm_compressor'; start from the float model",
    ),
    "MXFP4": (say(data_type="mx_fp"), r"data_type: expected int, got 'mx_fp'"),
    "quantized activations": (say(act_bits=8), r"act_bits: quantized activations"),
    "quantized scales": (say(super_bits=6), r"super_bits: quantized scales"),
    "a quantized cache": (say(static_kv_dtype="fp8"), r"static_kv_dtype: a quantized cache of keys and values"),
    "an unknown key": (say(outliers=3), r"quantization_config says 'outliers', which is not known here: got 3"),
    "an order": (say(desc_act=True), r"desc_act: expected false, as auto-round itself reads, got true"),
    "7 bits": (say(bits=7), r"bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
    "no bits": (lambda said: said.pop("bits"), r"bits: expected one of 2, 3, 4, 5, 6, 8, got none"),
    "other groups": (say(group_size=16), r"scales: expected 8 groups of 16 in 128 columns, got 4"),
    "words that are left out": (extra(q_proj={"bits": 16}), r"extra_config leaves out .*q_proj: expected floats there"),
    "a layer's own width": (extra(v_proj={"bits": 8}), r"v_proj\.scales: expected 1 groups of 32 in 32 columns, got 2"),
    "a layer's activations": (extra(up_proj={"act_bits": 8}), r"extra_config: up_proj: act_bits: quantized activat"),
    "a layer's unknown key": (extra(up_proj={"outliers": 8}), r"extra_config: up_proj says 'outliers', which is not"),
    "an expression": (say(extra_config={"(a+)+": {"bits": 8}}), r"'\(a\+\)\+': an expression with repeated groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, packed: Callable[..., Path], tmp_path: Path) -> None:
    change, message = REFUSED[case]
    folder = copied(packed("auto_round"), tmp_path / "changed", lambda tensors: None)
    change_config(folder, change)
    with pytest.raises(FormatError, match=message):
        read(folder)


def test_a_tensor_that_is_not_known_is_refused(packed: Callable[..., Path], tmp_path: Path) -> None:
    more = {f"{Q_PROJ}.hadamard_matrix": torch.ones(4)}
    folder = copied(packed("auto_round"), tmp_path / "changed", lambda tensors: tensors.update(more))
    with pytest.raises(FormatError, match=r"q_proj\.hadamard_matrix: a tensor that is not known here beside qweight"):
        read(folder)
