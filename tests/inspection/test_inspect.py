"""inspect: every warning on files that really have the fault, none on files that are right; the form of the JSON."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from qalora.adapter import Adapter, to_plain_lora, write_adapter
from qalora.checkpoint import Checkpoint
from qalora.cli import main
from qalora.converters import load
from qalora.converters.exports import export
from qalora.converters.plan import ExportOptions
from qalora.errors import InputError
from qalora.formats.gptq import pack_qzeros, unpack_qzeros
from qalora.inspection import WARNINGS, AdapterReport, Finding, FolderReport, ModelReport, inspect
from qalora.quantization import quantize
from qalora.tensor import GroupQuantTensor
from qalora.testing import byte_tokenizer, chat_model, random_adapter, random_model, tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"
TEMPLATE = "{{ messages }}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama with tokenizer and chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_llama(tmp_path_factory.mktemp("source"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def artefacts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model at 4 bits in groups of 32, with real zero points as every format, with integer ones as GPTQ."""
    root = tmp_path_factory.mktemp("artefacts")
    real = quantize(load(source), bits=4, group_size=32)
    export(real, ["qalora", "gguf", "mlx", "hqq", "onnx"], root)
    export(quantize(load(source), bits=4, group_size=32, zeros="integer"), ["gptq"], root / "integer")
    export(real, ["gptq"], root / "real")
    return root


@pytest.fixture
def gptq(artefacts: Path, tmp_path: Path) -> Path:
    """A copy of the GPTQ folder with integer zero points, to be damaged."""
    return Path(shutil.copytree(artefacts / "integer" / "gptq", tmp_path / "gptq"))


def warned(path: Path, **options: Any) -> dict[str, Finding]:
    report = inspect(path, **options)
    assert not isinstance(report, FolderReport)
    assert all(finding.code in WARNINGS and finding.evidence for finding in report.warnings)
    return {finding.code: finding for finding in report.warnings}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


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


@pytest.mark.parametrize("name", ["qalora", "gguf", "mlx", "hqq", "onnx", "onnx/portable"])
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
    layouts = sorted(artefact.layout for artefact in report.artifacts)
    assert layouts == ["gguf", "gptq", "gptq", "hqq", "mlx", "onnx", "onnx", "qalora"]


def test_what_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing that is known")
    for path in (tmp_path / "file", tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError):
            inspect(path)
        assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 2


def test_the_json_is_what_the_docstring_says(artefacts: Path, gptq: Path) -> None:
    keys = {"kind", "path", "layout", "family", "layers", "tied", "weights", "bytes", "bits_per_weight", "tensors"}
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


# ---- adapters


def made(model: Checkpoint, pool: int, *, modules: tuple[str, ...] = ()) -> Adapter:
    return random_adapter(
        model, pool_size=pool, seed=1, a_size=1.0, b_size=1.0, minima=None, scaling=2.0, modules=modules or None
    )


@pytest.fixture
def written(artefacts: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter for the model; without our record, and with other settings, as others write them."""

    def write(pool: int = 32, *, foreign: bool = False, modules: tuple[str, ...] = (), **settings: object) -> Path:
        folder = tmp_path / "adapter"
        write_adapter(made(load(artefacts / "qalora"), pool, modules=modules), folder)
        if foreign:
            (folder / "qalora_adapter.json").unlink()
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}), "utf-8")
        return folder

    return write


@pytest.mark.parametrize("based", [True, False])
def test_an_adapter_that_is_right_has_no_warning(written: Callable[..., Path], artefacts: Path, based: bool) -> None:
    report = inspect(written(), base=artefacts / "qalora" if based else None)
    assert isinstance(report, AdapterReport)
    assert report.warnings == ()
    assert (report.convention, report.layers) == ("paper", {(4, 32): 14})
    found = report.to_json()
    assert set(found) == {
        *("kind", "path", "layout", "convention", "minima", "use_qalora", "base", "parameters", "bytes", "layers"),
        *("notes", "warnings"),
    }
    assert found["layers"] == [{"count": 14, "rank": 4, "pool_size": 32}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("modules", "based"),
    [((), True), ((), False), (("q_proj", "v_proj"), False), (("up_proj", "down_proj"), False), (("k_proj",), True)],
)
def test_use_qalora_that_peft_ignored(
    source: Path, artefacts: Path, tmp_path: Path, modules: tuple[str, ...], based: bool
) -> None:
    """PEFT itself makes the adapter, over a float model, with the flag."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = list(modules or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    config = LoraConfig(r=4, target_modules=targets, use_qalora=True, qalora_group_size=16, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(tmp_path / "adapter")
    found = warned(tmp_path / "adapter", base=artefacts / "qalora" if based else None)
    assert "where pools of 16 would give" in found["qalora-ignored"].evidence
    assert f"{2 * len(targets)} of {2 * len(targets)} modules" in found["qalora-ignored"].evidence or not based


def test_use_qalora_that_peft_heeded(written: Callable[..., Path], artefacts: Path) -> None:
    folder = written(foreign=True, use_qalora=True, qalora_group_size=32)
    for base in (artefacts / "qalora", None):
        report = inspect(folder, base=base)
        assert isinstance(report, AdapterReport)
        assert (report.warnings, report.convention, report.use_qalora) == ((), "peft", True)


def test_pools_that_the_fold_takes(written: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    export(quantize(load(source), bits=4, group_size=64), ["qalora"], tmp_path)
    folder = written(pool=32)
    report = inspect(folder, base=tmp_path / "qalora")
    assert isinstance(report, AdapterReport)
    assert report.warnings == ()
    assert "splits the groups of 14 of 14 modules, 64 columns into 32" in report.notes[0]
    export(quantize(load(source), bits=4, group_size=16), ["qalora"], tmp_path / "fine")
    assert warned(folder, base=tmp_path / "fine" / "qalora") == {}  # a pool of two groups is exact


def test_a_pool_and_groups_without_a_common_measure(tmp_path: Path) -> None:
    wide = tiny_llama(tmp_path / "wide", config={"hidden_size": 96, "intermediate_size": 192, "head_dim": 24})
    export(quantize(load(wide), bits=4, group_size=32), ["qalora"], tmp_path)
    write_adapter(made(load(tmp_path / "qalora"), 48), tmp_path / "adapter")
    found = warned(tmp_path / "adapter", base=tmp_path / "qalora")
    assert (
        "a pool size that divides the group size 32 or is a multiple of it, got 48" in found["pool-mismatch"].evidence
    )


def test_what_the_base_refuses(written: Callable[..., Path], artefacts: Path, source: Path, gptq: Path) -> None:
    folder = written()
    assert "14 of 14 modules are float" in warned(folder, base=source)["float-base"].evidence
    edit(gptq, lambda tensors: tensors[f"{Q_PROJ}.g_idx"].copy_(tensors[f"{Q_PROJ}.g_idx"].flip(0)))
    assert "1 of 14 modules" in warned(folder, base=gptq)["act-order"].evidence


def test_an_ordinary_lora(artefacts: Path, tmp_path: Path) -> None:
    write_adapter(to_plain_lora(made(load(artefacts / "qalora"), 32)), tmp_path / "plain")
    assert warned(tmp_path / "plain") == {}
    assert set(warned(tmp_path / "plain", base=artefacts / "qalora")) == {"ordinary-lora"}


def test_an_adapter_of_another_model(written: Callable[..., Path], tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", config={"hidden_size": 128, "num_attention_heads": 8})
    assert "modules do not fit" in warned(written(), base=other)["other-base"].evidence


def test_an_unknown_convention(written: Callable[..., Path], artefacts: Path) -> None:
    folder = written(foreign=True)
    found = warned(folder, base=artefacts / "qalora")
    assert "2 (paper), 0.0625 (official)" in found["convention-unknown"].evidence
    assert warned(folder, base=artefacts / "qalora", convention="paper") == {}
    assert set(warned(written_again(folder, modules=("k_proj",)))) >= {"pool-unknown"}


def written_again(folder: Path, modules: tuple[str, ...]) -> Path:
    """The adapter with some modules only, so that no other tells how wide their inputs are."""

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.split(".")[-3] not in modules]:
            del tensors[name]

    edit(folder, keep, "adapter_model.safetensors")
    return folder


def test_values_of_an_adapter(written: Callable[..., Path]) -> None:
    folder = written()

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"][0, 0] = torch.nan
        tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"].zero_()

    edit(folder, damage, "adapter_model.safetensors")
    found = warned(folder)
    assert found["not-finite"].evidence == f"lora_A of {Q_PROJ}: 1 of 8 values"
    assert found["all-zero"].evidence == f"lora_B of {Q_PROJ}"


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
