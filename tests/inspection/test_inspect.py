"""inspect: every warning on files that really have the fault, none on files that are right; the form of the JSON."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from safetensors.torch import load_file

from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import InputError
from qalora.formats.gptq import pack_qzeros, unpack_qzeros
from qalora.inspection import FolderReport, ModelReport, inspect
from qalora.quantization import quantize
from qalora.tensor import GroupQuantTensor
from qalora.testing import byte_tokenizer, chat_model, random_model, tiny_llama
from targets import OF_REAL_ZEROS
from warned import Q_PROJ, edit, warned

TEMPLATE = "{{ messages }}"


def relabel(folder: Path, **changes: object) -> None:
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text("utf-8"))
        settings = content["quantization_config"] if name == "config.json" else content
        settings |= {"meta": {}, **changes}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def rezero(folder: Path, change: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
    """Change the stored zero points [out, groups] of every layer."""

    def every(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            stored = change(unpack_qzeros(tensors[name], 4, "gptq_v2"), name)
            tensors[name] = pack_qzeros(stored.to(torch.uint8), 4, "gptq_v2")

    edit(folder, every)


# ---- what it is


@pytest.mark.parametrize(
    "name", ["qalora", "gguf", "mlx", "hqq", "onnx", "onnx/portable", "openvino", "transformersjs", "torchao", "mnn"]
)
def test_a_model_that_is_right_has_no_warning(artefacts: Path, name: str) -> None:
    place = artefacts / name
    report = inspect(place if name != "onnx" else place / "model.onnx")
    assert isinstance(report, ModelReport)
    assert report.warnings == ()
    assert (report.family, report.layers, report.tied) == ("llama", 2, True)
    kinds = [(kind.count, kind.bits, kind.group_size, kind.zeros) for kind in report.tensors if kind.bits]
    assert kinds == [(14, 4, 32, "real")]


def test_sizes_are_those_on_disk(artefacts: Path) -> None:
    (path,) = (artefacts / "gguf").glob("*.gguf")
    report = inspect(path)
    assert isinstance(report, ModelReport)
    elements = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    assert (report.weights, report.nbytes) == (elements, path.stat().st_size)
    assert report.bits_per_weight == 8 * path.stat().st_size / elements
    assert report.device_load is not None
    assert report.device_load.nbytes == sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
    said = CliRunner().invoke(main, ["inspect", str(path), "--quick"]).stdout
    assert "a device loads  linear layers 5.00 bits per weight, embedding 32.00 (" in said


def test_the_histogram_counts_every_scale(artefacts: Path) -> None:
    """Against a slow loop over the scales."""
    model = load(artefacts / "qalora")
    slow: dict[int, int] = {}
    points = []
    for name in model.linears:
        tensor = model.tensors[name].load_quantized()
        for scale, minimum in zip(tensor.scale.flatten().tolist(), tensor.min.flatten().tolist(), strict=True):
            exponent = next(e for e in range(-30, 30) if 2.0**e <= abs(scale) < 2.0 ** (e + 1))
            slow[exponent] = slow.get(exponent, 0) + 1
            points.append(-minimum / scale)
    report = inspect(artefacts / "qalora")
    assert isinstance(report, ModelReport)
    assert report.histogram is not None
    assert dict(report.histogram.counts) == slow
    assert report.histogram.zero_points == pytest.approx((min(points), max(points)), rel=1e-6)
    assert len(report.histogram.lines()) == len(slow)


def test_constant_groups_and_negative_scales_are_counted(source: Path, tmp_path: Path) -> None:
    export(random_model(load(source)), ["qalora"], tmp_path)
    report = inspect(tmp_path / "qalora")
    assert isinstance(report, ModelReport)
    model = load(tmp_path / "qalora")
    scales = torch.cat([model.tensors[name].load_quantized().scale.flatten() for name in model.linears])
    assert report.histogram is not None
    assert report.histogram.zero == int((scales == 0).sum()) > 0
    assert report.histogram.negative == int((scales < 0).sum()) > 0
    assert sum(count for _, count in report.histogram.counts) == int((scales != 0).sum())


def test_quick_reads_no_values(gptq: Path) -> None:
    edit(gptq, lambda tensors: tensors[f"{Q_PROJ}.scales"].fill_(torch.nan))
    assert "not-finite" not in warned(gptq, quick=True)
    report = inspect(gptq, quick=True)
    assert isinstance(report, ModelReport)
    assert report.histogram is None


def test_a_folder_of_artefacts(artefacts: Path) -> None:
    report = inspect(artefacts)
    assert isinstance(report, FolderReport)
    assert sorted(artefact.layout for artefact in report.artifacts) == sorted([*OF_REAL_ZEROS, "gptq", "onnx"])


def test_what_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing that is known")
    for path in (tmp_path / "file", tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError):
            inspect(path)
        assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 2


def test_the_json_is_what_the_docstring_says(artefacts: Path, gptq: Path) -> None:
    keys = {
        "kind",
        "path",
        "layout",
        "family",
        "layers",
        "tied",
        "weights",
        "bytes",
        "bits_per_weight",
        "tensors",
        "device_load",
    }
    rezero(gptq, lambda stored, name: torch.full_like(stored, 7))
    result = CliRunner().invoke(main, ["inspect", str(gptq), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) == keys | {"codes", "ends", "files", "notes", "warnings"}
    assert set(found["ends"]) == {"tokens", "source"}
    assert set(found["codes"]) == {"scales", "zero_scales", "negative_scales", "zero_points"}
    assert set(found["tensors"][0]) == {"count", "weights", "dtype", "bits", "group_size", "zeros", "act_order"}
    assert set(found["warnings"][0]) == {"code", "message", "evidence", "todo"}
    folder = json.loads(CliRunner().invoke(main, ["inspect", str(artefacts), "--json"]).stdout)
    assert set(folder) == {"kind", "path", "artifacts"}


def test_warnings_are_printed_with_their_evidence(gptq: Path) -> None:
    (gptq / "tokenizer.json").unlink()
    result = CliRunner().invoke(main, ["inspect", str(gptq)])
    assert result.exit_code == 0
    assert "warning: no tokenizer" in result.stdout
    assert "seen: neither tokenizer.json nor tokenizer.model" in result.stdout
    assert "█" in result.stdout


# ---- zero points of GPTQ


@pytest.mark.parametrize(("label", "stored"), [("gptq", 8), ("gptq_v2", 7)])
def test_a_label_that_the_values_contradict(gptq: Path, label: str, stored: int) -> None:
    rezero(gptq, lambda zeros, name: torch.full_like(zeros, stored))
    relabel(gptq, checkpoint_format=label, sym=True)
    found = warned(gptq)
    true = "gptq_v2" if label == "gptq" else "gptq"
    assert f"in all 14 layers every stored zero point is {stored}" in found["zeros-label"].evidence
    assert f'"checkpoint_format": "{true}"' in found["zeros-label"].todo
    relabel(gptq, checkpoint_format=true, sym=True)
    assert "zeros-label" not in warned(gptq)


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_asymmetric_zeros_off_by_one_are_seen_in_the_weights(gptq: Path, label: str) -> None:
    """No label can be right by value here; the codes themselves lie a step beside."""
    if label == "gptq":  # the folder holds version 2
        relabel(gptq, checkpoint_format="gptq")
        assert "a step below their zero point" in warned(gptq)["zeros-off-by-one"].evidence
        assert "zeros-off-by-one" not in warned(gptq, checkpoint_format="gptq_v2")
        words = ["inspect", str(gptq), "--checkpoint-format", "gptq_v2", "--json"]
        assert "off-by-one" not in CliRunner().invoke(main, words).stdout
    else:
        assert "zeros-off-by-one" not in warned(gptq)
        rezero(gptq, lambda zeros, name: (zeros.int() - 1).clamp(min=0))
        assert "a step above their zero point" in warned(gptq)["zeros-off-by-one"].evidence


def test_zeros_off_by_one_are_seen_in_any_format(source: Path, tmp_path: Path) -> None:
    """A converter that took version 2 for version 1, and wrote a GGUF file of what it read."""
    model = quantize(load(source), bits=4, group_size=32)

    def shifted(tensor: GroupQuantTensor) -> GroupQuantTensor:
        return replace(tensor, min=(tensor.min - tensor.scale).half().float())

    tensors = dict(model.tensors)
    for name in model.linears:
        lazy = model.tensors[name]
        tensors[name] = replace(lazy, read=lambda a, b, lazy=lazy: shifted(lazy.load_quantized()).rows(a, b))
    export(replace(model, tensors=tensors), ["gguf"], tmp_path)
    assert set(warned(tmp_path / "gguf")) == {"zeros-off-by-one"}


def test_layers_stored_in_two_ways(gptq: Path) -> None:
    rezero(gptq, lambda zeros, name: torch.full_like(zeros, 7 if ".0." in name else 8))
    relabel(gptq, checkpoint_format="gptq", sym=True)
    assert "7 layers as they are" in warned(gptq)["zeros-mixed"].evidence


def test_sym_that_is_not(gptq: Path) -> None:
    relabel(gptq, checkpoint_format="gptq_v2", sym=True)
    found = warned(gptq)
    assert "14 of 14 layers have others" in found["symmetry-label"].evidence
    assert "Marlin" in found["symmetry-label"].message


def test_genai_misreads_version_2(artefacts: Path, gptq: Path) -> None:
    assert "onnxruntime-genai" in warned(gptq)["runtime"].message
    rezero(gptq, lambda zeros, name: torch.full_like(zeros, 7))
    relabel(gptq, checkpoint_format="gptq", sym=True)
    assert "runtime" not in warned(gptq)


def test_gptqmodel_refuses_asymmetric_version_1(gptq: Path) -> None:
    rezero(gptq, lambda zeros, name: zeros.clamp(min=1) - 1)
    relabel(gptq, checkpoint_format="gptq", sym=False)
    assert "GPTQModel, and transformers through it, refuse it" in warned(gptq)["runtime"].message
    relabel(gptq, checkpoint_format="gptq", sym=False, meta={"quantizer": ["gptqmodel:7.6.0"]})
    assert "runtime" not in warned(gptq)


def test_a_zero_that_version_1_cannot_store(gptq: Path) -> None:
    def wrap(zeros: torch.Tensor, name: str) -> torch.Tensor:
        stored = zeros.clamp(min=1) - 1
        stored[0, 0] = 15
        return stored

    rezero(gptq, wrap)
    relabel(gptq, checkpoint_format="gptq", sym=False)
    assert "14 of 14 layers store 15" in warned(gptq)["zeros-wrap"].evidence


def test_a_residual_beside(artefacts: Path) -> None:
    assert set(warned(artefacts / "real" / "gptq")) == {"residual-beside"}


def test_act_order(gptq: Path) -> None:
    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        g_idx = tensors[f"{Q_PROJ}.g_idx"]
        tensors[f"{Q_PROJ}.g_idx"] = g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(0))]

    edit(gptq, shuffle)
    found = warned(gptq)["act-order"]
    assert f"in 1 of 14 layers g_idx is not column // group_size; the first is {Q_PROJ}.weight" in found.evidence


# ---- values


@pytest.mark.parametrize("part", ["q_proj.scales", "input_layernorm.weight"])
def test_nan_and_inf(gptq: Path, part: str) -> None:
    name = f"model.layers.0.{'self_attn.' if 'q_proj' in part else ''}{part}"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3], tensors[name].view(-1)[5] = torch.nan, torch.inf
        assert tensors[name].numel() in (64, 128)

    edit(gptq, damage)
    found = warned(gptq)
    assert f"NaN or Inf in 2 of {load_file(gptq / 'model.safetensors')[name].numel()}" in found["not-finite"].evidence


@pytest.mark.parametrize("name", [f"{Q_PROJ}.scales", "model.norm.weight"])
def test_a_layer_of_zeros(gptq: Path, name: str) -> None:
    edit(gptq, lambda tensors: tensors[name].zero_())
    found = warned(gptq)
    assert found["all-zero"].evidence == name.replace(".scales", ".weight")


def test_a_float_layer_of_zeros(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "float")
    assert warned(tmp_path / "float") == {}
    edit(tmp_path / "float", lambda tensors: tensors[f"{Q_PROJ}.weight"].zero_())
    assert set(warned(tmp_path / "float")) == {"all-zero"}


def test_a_layer_that_is_not_what_the_others_say(gptq: Path) -> None:
    """Symmetric in the layers that are looked at first; the reader refuses the one that is not, inspect goes on."""
    last = "model.layers.1.self_attn.v_proj.qzeros"
    rezero(gptq, lambda zeros, name: torch.full_like(zeros, 7) if name != last else zeros)
    relabel(gptq, checkpoint_format="gptq", sym=True)
    found = warned(gptq)
    assert "v_proj" in found["unreadable"].evidence
    assert "symmetry-label" in found


# ---- companions


def test_no_tokenizer(tiny_untied: Path, tmp_path: Path) -> None:
    assert set(warned(tiny_untied)) == {"no-tokenizer"}
    export(quantize(load(tiny_untied), bits=4, group_size=32), ["gguf"], tmp_path)
    assert "'none'" in warned(tmp_path / "gguf")["no-tokenizer"].evidence


def test_no_chat_template(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", tokenizer=byte_tokenizer())
    assert set(warned(folder)) == {"no-chat-template"}
    export(quantize(load(folder), bits=4, group_size=32), ["gguf"], tmp_path)
    assert warned(tmp_path / "gguf")["no-chat-template"].evidence == "no tokenizer.chat_template in its GGUF metadata"
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}), "utf-8")
    assert warned(folder) == {}


def test_a_gguf_without_the_rule_that_cuts_text(artefacts: Path, tmp_path: Path) -> None:
    (path,) = (artefacts / "gguf").glob("*.gguf")
    data = path.read_bytes()
    assert data.count(b"tokenizer.ggml.pre") == 1
    (tmp_path / "model.gguf").write_bytes(data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.pro"))
    assert "tokenizer.ggml.pre is absent" in warned(tmp_path / "model.gguf")["runtime"].evidence


def test_int8_activations(source: Path, tmp_path: Path) -> None:
    model = quantize(load(source), bits=4, group_size=32)
    export(model, ["onnx"], tmp_path, ExportOptions(accuracy_level=4))
    assert "accuracy_level 4" in warned(tmp_path / "onnx" / "model.onnx")["runtime"].evidence


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_minima_of_mlx_in_bfloat16(source: Path, tmp_path: Path, dtype: str) -> None:
    """mlx-lm itself quantizes the model; biases have the dtype that it is converted to."""
    from mlx_lm.convert import convert

    convert(str(source), str(tmp_path / "mlx"), quantize=True, q_group_size=32, q_bits=4, dtype=dtype)
    found = warned(tmp_path / "mlx")
    assert set(found) == ({"runtime"} if dtype == "bfloat16" else set())
    if found:
        assert found["runtime"].evidence == "15 of 15 layers have biases in bfloat16, with 8 significant bits"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([385, 391], "385 '<|end_of_text|>', 391 '<|eot_id|>' (generation_config.json)"),
        (None, "no token"),
        ("x", "not"),
    ],
)
def test_what_ends_a_generation(value: object, line: str, tmp_path: Path) -> None:
    """With its texts and its source; a note where config.json says another, a warning where it is no token."""
    folder = chat_model(tmp_path / "model", "llama3")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}), encoding="utf-8")
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 0
    (shown,) = [text for text in result.stdout.splitlines() if text.startswith("ends at")]
    assert line in shown
    assert ("[end-token]" in result.stdout) == (value == "x")
    assert ("config.json says 385 '<|end_of_text|>'" in result.stdout) == (value != "x")
