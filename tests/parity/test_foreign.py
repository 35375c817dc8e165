"""verify on artefacts that others made, against references that others made."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader

from qalora.cli import main
from qalora.converters import huggingface, load
from qalora.converters.tokenizer import write_tokenizer
from qalora.parity import ParityReport, verify
from qalora.parity.reference import Forward, Reference
from qalora.tensor import GroupQuantTensor
from qalora.testing import byte_tokenizer, random_model, tiny_llama

pytestmark = [
    pytest.mark.slow,
    # GPTQModel keeps a temporary folder for offloading until its config is collected
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("onnx_ir") is None, reason="onnxruntime-genai's builder needs onnx-ir, not installed"
)

EXACT = ("accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul")
"""The builder's options under which a graph holds a GPTQ folder exactly: by default it computes with int8 activations
(accuracy level 4), and turns the output layer, which GPTQ leaves in floats, into 4-bit integers."""


BUILDS = """
import json, runpy, sys
for words in json.load(sys.stdin):
    sys.argv[1:] = words
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
"""
"""`python -m onnxruntime_genai.models.builder` with each of several command lines, in one process: importing takes it
many times what a tiny model does."""


def build(graphs: dict[Path, tuple[Path, str, tuple[str, ...]]]) -> None:
    """What onnxruntime-genai's builder makes of model folders: (source, precision, options) of each place."""
    words = []
    for place, (source, precision, options) in graphs.items():
        words.append(["-i", str(source), "-o", str(place), "-p", precision, "-e", "cpu", "-c", str(place / "cache")])
        words[-1] += ["--extra_options", "hf_token=false", *options]
    command = [sys.executable, "-c", BUILDS]
    done = subprocess.run(command, input=json.dumps(words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def tamed(tensor: GroupQuantTensor) -> GroupQuantTensor:
    """A quarter of the scale: random codes give weights so large that the logits say nothing."""
    return replace(tensor, scale=tensor.scale / 4, min=tensor.min / 4)


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama of bytes, with an output layer of its own."""
    folder = tmp_path_factory.mktemp("bytes")
    return tiny_llama(folder, tokenizer=byte_tokenizer(), config={"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def packed(tiny_bytes: Path, packed_by_gptqmodel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model packed with GPTQModel, with its tokenizer: symmetric as gptq, and with integer zeros as both."""

    def pack(sym: bool, version: str) -> Path:
        source = random_model(
            huggingface.read(tiny_bytes), bits=4, zeros="symmetric" if sym else "integer", change=tamed
        )
        folder, _ = packed_by_gptqmodel(source, tmp_path_factory.mktemp("packed") / "gptq", sym=sym, version=version)
        write_tokenizer(source, folder)
        return folder

    return {"symmetric": pack(True, "gptq"), "gptq": pack(False, "gptq"), "gptq_v2": pack(False, "gptq_v2")}


@pytest.fixture(scope="module")
def built(packed: dict[str, Path], tiny_bytes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The builder's graphs of `packed`, and others; not to be written to."""
    sources = {name: (source, "int4", EXACT) for name, source in packed.items()}
    sources["by default"] = (packed["symmetric"], "int4", ())
    sources["int4"] = (tiny_bytes, "int4", EXACT[:1])
    sources["fp32"] = (tiny_bytes, "fp32", ())
    places = {name: tmp_path_factory.mktemp("built") / "onnx" for name in sources}
    build({places[name]: source for name, source in sources.items()})
    return places


def failed(report: ParityReport) -> set[tuple[str, str]]:
    return {(where, result.gate) for where, result in report.results() if result.status != "pass"}


@needs_builder
def test_the_builders_graph_of_a_gptq_checkpoint_passes(packed, built, tmp_path: Path) -> None:
    """A v1 symmetric checkpoint, weights bit for bit, and the logits in ONNX Runtime and onnxruntime-genai."""
    source, graph = packed["symmetric"], built["symmetric"]
    report = verify(source, [graph], max_tokens=64, generate=8)
    assert report.passed() and failed(report) == set(), report.failure()
    (artifact,) = report.artifacts
    assert artifact.weights.tensors == 14 + 7 and artifact.weights.total.same and artifact.weights.total.codes > 70_000
    assert {result.gate for result in artifact.gates} >= {"config", "codes", "minima", "floats", "tokenizer"}
    assert [run.kind for run in artifact.runs] == ["onnxruntime", "onnxruntime-genai"]
    out = tmp_path / "report.json"
    command = ["verify", str(source), str(graph), "--max-tokens", "32", "--generate", "4", "--report", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    weights = json.loads(out.read_text(encoding="utf-8"))["artifacts"][0]["weights"]
    assert weights["error_max"] == weights["step_max"] == weights["zeros_above"] == 0 and weights["notes"] == []


@needs_builder
def test_a_folder_made_for_cuda_is_not_proven_in_genai_without_it(packed, built, tmp_path: Path) -> None:
    """ONNX Runtime runs its graph on the CPU all the same; onnxruntime-genai wants the CUDA that the folder names."""
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    graph = tmp_path / "onnx"
    shutil.copytree(built["symmetric"], graph)
    config = json.loads((graph / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (graph / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    report = verify(packed["symmetric"], [graph], max_tokens=64, generate=2)
    assert failed(report) == {("onnx in onnxruntime-genai", "runtime")}
    assert not report.passed() and report.passed(allow_unproven=True)


@needs_builder
def test_what_the_builder_changes_by_default_is_told(packed, built) -> None:
    """The output layer, floats of a quantized model, in 4 bits: up to a step away, since its grid clips one side."""
    report = verify(packed["symmetric"], [built["by default"]], level="weights")
    assert {gate for _, gate in failed(report)} == {"floats"}
    (different,) = report.artifacts[0].weights.different
    assert different.name == "lm_head.weight" and different.name in report.failure()
    assert 0.25 < different.step_rms < 0.35 and 0.5 < different.step_max <= 1.01


@needs_builder
def test_the_builders_misread_zero_points_are_found_by_name(packed, built) -> None:
    """It adds 1 to every zero point, which is right for gptq and wrong for gptq_v2."""
    source, graph = packed["gptq_v2"], built["gptq_v2"]
    report = verify(source, [graph], max_tokens=32, level="logits")
    assert {gate for _, gate in failed(report)} == {"minima", "logits"}
    total = report.artifacts[0].weights.total
    assert total.zeros_above == total.min_differ > 0.9 * total.groups and total.zeros_below == total.codes_differ == 0
    done = CliRunner().invoke(main, ["verify", str(source), str(graph), "--level", "weights"])
    assert done.exit_code == 1
    assert "zero points are one too large" in " ".join(done.output.split())
    assert "as in a gptq_v2 checkpoint read as gptq" in " ".join(done.output.split())


@needs_builder
def test_the_builder_reads_no_borrow_between_v1_zero_points(packed, built) -> None:
    """GPTQModel subtracts 1 from whole words, so that a zero point of 0 borrows from the next; the builder adds 1 to
    each by itself, and finds that next one too small."""
    report = verify(packed["gptq"], [built["gptq"]], level="weights")
    assert {gate for _, gate in failed(report)} == {"minima"}
    total = report.artifacts[0].weights.total
    assert 0 < total.zeros_below == total.min_differ < 0.1 * total.groups
    assert f"zero points are one too small in {total.zeros_below} of" in report.failure()
    assert "as in a" not in report.failure()


@needs_builder
def test_a_float_model_in_the_builders_integers_is_proven_by_its_own_weights(tiny_bytes: Path, built) -> None:
    """How far the quantization moved is reported, in steps; the runtime is held to what its integers give."""
    report = verify(tiny_bytes, [built["int4"]], max_tokens=64, generate=8)
    assert report.passed(), report.failure()
    (artifact,) = report.artifacts
    assert [result.gate for result in artifact.gates if result.status == "ambiguous"] == ["steps"]  # its grid clips
    total = artifact.weights.total
    assert total.requantized > 70_000 and 0.25 < total.step_rms < 0.35
    run = artifact.runs[0]
    assert run.own is not None and run.logits is not None and run.own.max < 1e-3 * run.logits.max
    floats = verify(tiny_bytes, [built["fp32"]], max_tokens=64, level="logits")
    assert failed(floats) == set(), floats.failure()
    assert floats.artifacts[0].runs[0].own is None


@pytest.fixture(scope="module", params=["cut", pytest.param("whole", marks=pytest.mark.long)])
def foreign(request: pytest.FixtureRequest, smollm2: Path, smollm2_cut: Path) -> Path:
    """A GGUF file of llama.cpp's own making: SmolLM2's, or a part of it."""
    return {"cut": smollm2_cut, "whole": smollm2}[request.param]


@pytest.fixture(scope="module")
def loaded_by_transformers(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers makes of the GGUF file, saved in float32, with its conversion of the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("transformers")
    loaded = AutoModelForCausalLM.from_pretrained(foreign.parent, gguf_file=foreign.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # it refuses to save what it calls quantized, and has dequantized
    plain = LlamaForCausalLM(LlamaConfig(**settings)).float()
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(foreign.parent, gguf_file=foreign.name).save_pretrained(folder)
    return folder


def test_a_gguf_file_against_transformers_load_of_it(foreign: Path, loaded_by_transformers: Path) -> None:
    """Every weight is the same float32; its conversion of the tokenizer drops SmolLM's rule for digits."""
    report = verify(foreign, [loaded_by_transformers], level="logits", max_tokens=24)
    name = loaded_by_transformers.name
    # and its folder ends at <|im_end|> alone, where llama.cpp ends at <|endoftext|> too, which it knows by name
    places = (name, f"{name} in transformers")
    assert failed(report) == {(place, gate) for place in places for gate in ("tokenizer", "end")}
    assert "of a text is" in report.failure()
    (artifact,) = report.artifacts
    shapes = [tensor.shape for tensor in GGUFReader(foreign).tensors]
    assert artifact.weights.total.values == sum(math.prod(map(int, shape)) for shape in shapes) > 8_000_000
    assert artifact.weights.total.values_differ == 0
    (run,) = artifact.runs  # transformers' eager attention sums in another order than the reference's
    assert {result.gate: result.status for result in run.gates}["logits"] == "pass"
    models = [load(path) for path in (foreign, loaded_by_transformers)]
    ours, theirs = (Reference(model).logits(list(range(24)), Forward()) for model in models)
    assert torch.equal(ours, theirs)


def test_transformers_load_of_it_against_the_gguf_file(
    foreign: Path, loaded_by_transformers: Path, tmp_path: Path
) -> None:
    """The other way round, with the right tokenizer: llama.cpp is held to the integers, since it rounds for them."""
    floats = load(loaded_by_transformers)
    write_tokenizer(load(foreign), tmp_path)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    reference = replace(floats, files={**floats.files, **{name: tmp_path / name for name in names}})
    report = verify(reference, [foreign], level="logits", max_tokens=24)
    assert {gate for _, gate in failed(report)} == {"end"}  # llama.cpp's names of end tokens, as above
    assert report.passed(), report.failure()
    (artifact,) = report.artifacts
    assert artifact.weights.total.same and artifact.weights.total.requantized == 0
    (run,) = artifact.runs
    assert run.rounding == "q8" and run.own is not None and run.logits is not None
    assert run.own.max == pytest.approx(run.logits.max, rel=1e-3)  # the weights are the same
    assert {result.gate for result in run.gates} >= {"tokenizer", "activation rounding", "top-1"}
