"""OpenVINO graphs: what they hold, what OpenVINO makes of them, and what is refused."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import openvino
import pytest
import torch

from in_float64 import float64
from qalora import export
from qalora.checkpoint import Checkpoint
from qalora.converters import exports, load
from qalora.converters.openvino import carriers
from qalora.converters.openvino.files import EXACT_OPTIONS
from qalora.converters.openvino.tokenizer import tokenizer_files
from qalora.converters.plan import ExportOptions
from qalora.converters.torch_module import build
from qalora.errors import FormatError, InputError
from qalora.formats.openvino import read_ir
from qalora.parity import verify
from qalora.parity.runtimes import open_runtime
from qalora.parity.runtimes.openvino_genai import open_artifact
from qalora.parity.runtimes.settings import keep_settings
from qalora.quantization import quantize
from qalora.tensor import BITS
from qalora.testing import (
    assert_same_model,
    byte_tokenizer,
    lazily,
    random_model,
    random_tensor,
    small_tokenizer,
    tiny_llama,
    tiny_model,
)

TOKENS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(7))
XML = "openvino_model.xml"


@pytest.fixture(autouse=True)
def the_process_stays_as_it_was() -> Iterator[None]:
    """Some tests open graphs by OpenVINO's own calls."""
    with keep_settings():
        yield


def written(model: Checkpoint, out: Path, **options: Any) -> Path:
    exports.export(model, ["openvino"], out, ExportOptions(**options))
    return out / "openvino"


def assert_computes(folder: Path, model: Checkpoint) -> None:
    """Within 8 times torch's own float32 error, at once and step by step."""
    wanted, noise = float64(model, TOKENS[None])
    runtime = open_runtime("openvino", folder, threads=1)
    for got in (runtime.logits(TOKENS.tolist()), runtime.steps(TOKENS.tolist())):
        error = float((got.double() - wanted[0]).abs().max())
        assert error <= 8 * noise, f"{error:.2g} with torch at {noise:.2g}"
    runtime.close()


def products(folder: Path) -> Counter[str]:
    """The types of the weights that OpenVINO multiplies with, counted; packed ones if it has not unpacked them."""
    compiled = openvino.Core().compile_model(folder / XML, "CPU", EXACT_OPTIONS)
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected":
            found[node.input_value(1).get_element_type().get_type_name()] += 1
    return found


@pytest.mark.pairs(bits=BITS, zeros=["real", "integer", "symmetric"], group_size=[8, 16, 32, 64, None])
def test_codes_stay_packed_and_compute_the_same(
    bits: int,
    zeros: Literal["real", "integer", "symmetric"],
    group_size: int | None,
    untied: Checkpoint,
    tmp_path: Path,
) -> None:
    """Scales of 0 and below 0 are among them, and rows of an odd number of groups."""
    model = random_model(untied, bits=bits, zeros=zeros, group_size=group_size)
    folder = written(model, tmp_path)
    assert_same_model(load(folder), model)
    assert_computes(folder, model)
    floats = 1  # the output layer
    assert products(folder) == {f"u{carriers.CONTAINERS[bits]}": len(model.linears), "f32": floats}


def test_float32_scales_and_minima_are_held_as_they_are(untied: Checkpoint, tmp_path: Path) -> None:
    def spread(tensor: Any) -> Any:
        return replace(tensor, scale=tensor.scale * 1.0001, min=tensor.min * 1.0001)

    model = random_model(untied, min_dtype=torch.float32, scale_dtype=torch.float32, change=spread)
    folder = written(model, tmp_path)
    assert_same_model(load(folder), model)
    assert_computes(folder, model)


def test_zero_points_that_are_all_one_are_held_once(untied: Checkpoint, tmp_path: Path) -> None:
    model = quantize(untied, bits=4, group_size=32, zeros="symmetric")
    folder = written(model, tmp_path)
    shapes = {item.name: item.shape for item in read_ir(folder / XML).constants.values()}
    assert {shape for name, shape in shapes.items() if name.endswith(".zero")} == {(1, 1, 1)}
    assert_same_model(load(folder), model)
    assert_computes(folder, model)


@pytest.mark.parametrize("zeros", ["real", "integer"])
def test_act_order(zeros: Any, untied: Checkpoint, tmp_path: Path) -> None:
    """q, k and v have one order, gate and up have one, o and down each their own."""
    model = random_model(untied, zeros=zeros)
    tensors = dict(model.tensors)
    for name in model.linears:
        tensor, spec = tensors[name].load_quantized(), tensors[name].spec
        layer, kind = name.split(".")[2], name.split(".")[-2].removesuffix("_proj")
        seed = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 3, "up": 3, "down": 4}[kind] + 10 * int(layer)
        columns = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(seed))
        mixed = replace(tensor, g_idx=(columns // tensor.group_size).int())
        assert spec is not None
        tensors[name] = lazily(name, mixed, zeros=spec.zeros, min_dtype=spec.min_dtype)
    model = replace(model, tensors=tensors)
    folder = written(model, tmp_path)
    orders = {item.name for item in read_ir(folder / XML).constants.values() if item.name.endswith(".order")}
    assert len(orders) == 8  # four in each of two layers
    assert_same_model(load(folder), model)
    assert_computes(folder, model)


@pytest.mark.parametrize(("zeros", "held"), [("integer", "u8"), ("real", "f32")])
def test_an_embedding_of_codes(zeros: Any, held: str, tiny: Path, tmp_path: Path) -> None:
    """Looked up from codes where zero points are integers, and the output multiplies with the same ones."""
    floats = load(tiny)
    name = "model.embed_tokens.weight"
    rows, columns = floats.tensors[name].shape
    tensor = random_tensor(rows, columns, bits=8, group_size=32, zeros=zeros)
    codes = lazily(name, tensor, zeros=zeros, min_dtype=torch.float32)
    model = replace(random_model(floats), tensors={**random_model(floats).tensors, name: codes})
    folder = written(model, tmp_path)
    assert_computes(folder, model)
    assert products(folder) == {"u4": len(model.linears), held: 1}
    assert (load(folder).tensors[name].spec is None) == (zeros == "real")


def test_floats_keep_their_type(untied: Checkpoint, tmp_path: Path) -> None:
    """A matrix of bfloat16 stays one; a norm is float32."""

    def narrow(dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
        return lambda start, stop: whole[start:stop].to(dtype)

    name = "lm_head.weight"
    whole = untied.tensors[name].load_float()
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        lazy = replace(untied.tensors[name], dtype=dtype, read=narrow(dtype))
        model = replace(untied, tensors={**untied.tensors, name: lazy})
        folder = written(model, tmp_path / word)
        held = {item.name: item.element for item in read_ir(folder / XML).constants.values()}
        assert (held[name], held["model.norm.weight"]) == (word, "f32")
        assert_same_model(load(folder), model)
        assert_computes(folder, model)


def test_the_graph_asks_for_float32(untied: Checkpoint, tmp_path: Path) -> None:
    """What a graph can ask for is what OpenVINO then does without being told; `fast` asks for nothing."""
    model = random_model(untied)
    for precision, wanted in (("float32", EXACT_OPTIONS), ("fast", {})):
        folder = written(model, tmp_path / precision, openvino_precision=precision)
        info = read_ir(folder / XML).info
        asked = {key: value for key, value in info.items() if key.startswith("runtime_options/")}
        assert asked == {f"runtime_options/{key}": value for key, value in wanted.items()}
        compiled = openvino.Core().compile_model(folder / XML, "CPU")
        cache = compiled.get_property("KV_CACHE_PRECISION").get_type_name()
        assert cache == ("f32" if precision == "float32" else "u8")
        group = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
        assert (group == 0) == (precision == "float32")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_genai_generates_the_same(family: str, tmp_path: Path) -> None:
    """By both ways of attention that openvino-genai has: its paged one drops any mask that it does not know, and the
    prompt is longer than the window.
    """
    model = load(tiny_model(tmp_path / "float", family, tokenizer=byte_tokenizer()))
    folder = written(quantize(model, bits=4, group_size=32), tmp_path)
    module, tokens = build(load(folder)).double(), TOKENS.tolist()
    with torch.no_grad():
        for _ in range(12):
            logits = module(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    for backend in (None, "SDPA", "PA"):
        runtime = open_artifact(folder, 1, backend)
        assert runtime.generate(TOKENS.tolist(), 12) == tokens[len(TOKENS) :], backend
        runtime.close()


def test_what_the_runtime_s_own_precision_loses_is_measured(untied: Checkpoint, tmp_path: Path) -> None:
    """On a processor with bfloat16 more than float32 loses; whatever it is, no gate is about it."""
    model = quantize(untied, bits=4, group_size=32)
    for precision, kinds in (("float32", ["openvino"]), ("fast", ["openvino", "openvino-fast"])):
        folder = written(model, tmp_path / precision, openvino_precision=precision)
        report = verify(model, [folder], level="logits", tokens=TOKENS.tolist(), threads=1)
        assert report.passed(), report.failure()
        runs = report.artifacts[0].runs
        assert [run.kind for run in runs] == kinds
    exact, fast = runs
    assert exact.gates and not fast.gates
    assert fast.logits is not None and exact.logits is not None and fast.runtime is not None
    assert (fast.logits.max > 10 * exact.logits.max) == (fast.runtime.dtype == "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("zeros", "survives"), [("symmetric", True), ("real", False)])
def test_openvino_genai_rounds_the_zero_points_of_a_gguf_file(zeros: Any, survives: bool, tmp_path: Path) -> None:
    """What docs/formats.md says of its own loader of GGUF files: it makes a graph of them, with whole zero points."""
    import openvino_genai

    model = quantize(load(tiny_llama(tmp_path / "float", tokenizer=small_tokenizer())), group_size=32, zeros=zeros)
    export(model, "gguf", tmp_path)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    openvino_genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)
    wanted, noise = float64(model, TOKENS[None])
    got = open_runtime("openvino", tmp_path / "gguf" / XML, threads=1).logits(TOKENS.tolist()).double()
    if survives:
        assert float((got - wanted[0]).abs().max()) <= 16 * noise
    else:
        assert float((got - wanted[0]).norm() / wanted.norm()) > 0.1


def test_a_tokenizer_has_the_same_bytes_at_every_run(tmp_path: Path) -> None:
    """openvino-tokenizers counts the layers of a process, and names them so."""
    model = load(tiny_model(tmp_path / "float", "llama", tokenizer=byte_tokenizer()))
    first, notes = tokenizer_files(model)
    assert not notes and len(first) == 4
    assert tokenizer_files(model)[0] == first


def test_without_the_tokenizer_s_library_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    known = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "openvino_tokenizers" else known(name))
    model = load(tiny_model(tmp_path / "float", "llama", tokenizer=byte_tokenizer()))
    (plan,) = export(model, "openvino", tmp_path)
    assert any("openvino-tokenizers is not installed" in note for note in plan.notes)
    assert not list((tmp_path / "openvino").glob("openvino_tokenizer*"))
    assert_computes(tmp_path / "openvino", model)


def test_the_files_are_those_of_the_plan(tmp_path: Path) -> None:
    model = random_model(load(tiny_model(tmp_path / "float", "llama", tokenizer=byte_tokenizer())))
    (plan,) = export(model, "openvino", tmp_path)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "openvino").iterdir()}
    assert sizes.keys() == plan.files.keys()
    assert all(size in (None, sizes[name]) for name, size in plan.files.items())
    export(model, "openvino", tmp_path / "again")
    for name in sizes:
        assert (tmp_path / "openvino" / name).read_bytes() == (tmp_path / "again" / "openvino" / name).read_bytes()


def _replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


Q = "model.layers.0.self_attn.q_proj"

DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "no xml": (lambda text: text[: len(text) // 2], "an OpenVINO graph, got no XML"),
    "another root": (lambda text: "<other/>", "an OpenVINO graph, <net> of version 10 or 11"),
    "a version": (_replaced('version="11"', 'version="99"'), "version 99"),
    "a document type": (_replaced("<net", "<!DOCTYPE net [<!ENTITY a 'b'>]><net"), "XML with a document type"),
    "an offset beyond": (_replaced(' offset="0"', ' offset="99999999999"'), "a file of"),
    "a negative offset": (_replaced(' offset="0"', ' offset="-1"'), "a whole number, got '-1'"),
    "a size": (_replaced('element_type="u4" shape="', 'element_type="u8" shape="'), "as its type and shape say"),
    "a type": (_replaced('element_type="u4"', 'element_type="q4"'), "got 'q4'"),
    "a name twice": (_replaced(f'name="{Q}.scale" type', f'name="{Q}.codes" type'), "two constants are called"),
    "a constant missing": (_replaced(f'name="{Q}.scale" type', 'name="other" type'), f"{Q}.scale: expected f16"),
    "no metadata": (_replaced("<qalora.tensors", "<qalora.other"), "a weight, a norm, a bias, or rotary positions"),
    "another layout": (_replaced('<qalora.openvino value="1"', '<qalora.openvino value="7"'), "update qalora"),
    "layers of one number": (_replaced('<layer id="1"', '<layer id="0"'), "layers with numbers of their own"),
    "an edge from nowhere": (_replaced('<edge from-layer="0"', '<edge from-layer="98765"'), "edges between its layers"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_graphs_are_refused(kind: str, untied: Checkpoint, tmp_path: Path) -> None:
    change, words = DAMAGE[kind]
    folder = written(random_model(untied), tmp_path)
    (folder / XML).write_text(change((folder / XML).read_text("utf-8")), "utf-8")
    with pytest.raises(FormatError) as error:
        load(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_damaged_values_are_refused(untied: Checkpoint, tmp_path: Path) -> None:
    """Codes beyond their width, infinite scales, zero points beyond what codes can be."""
    model = random_model(untied, bits=3, zeros="integer")
    folder = written(model, tmp_path)
    places = {item.name: item for item in read_ir(folder / XML).constants.values()}
    data = (folder / "openvino_model.bin").read_bytes()
    said = (("codes", 0xFF, "codes of 3 bits"), ("scale", 0x7C, "finite"), ("zero", 0xFF, "integers"))
    for part, byte, words in said:
        at = places[f"{Q}.{part}"].offset
        changed = bytes([byte] * 4) if part != "scale" else bytes([0, byte] * 2)
        (folder / "openvino_model.bin").write_bytes(data[:at] + changed + data[at + 4 :])
        with pytest.raises(InputError, match=words):
            load(folder).tensors[f"{Q}.weight"].load()


def test_other_positions_in_the_config_are_refused(untied: Checkpoint, tmp_path: Path) -> None:
    folder = written(untied, tmp_path)
    path = folder / "config.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 50000.0'), "utf-8")
    assert path.read_text("utf-8") != text
    with pytest.raises(FormatError, match="put back the config"):
        load(folder)


def test_a_text_that_xml_cannot_hold_is_refused(untied: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no control characters"):
        written(untied, tmp_path, provenance={"qalora.provenance.base": "a\x00b"})
    assert not (tmp_path / "openvino").exists()


def dense(graph: Any, module: str, lazy: Any) -> str:
    """The chain that would be natural: codes * scale + min."""
    steps = graph.add("Multiply", [graph.wide(f"{module}.codes"), graph.wide(f"{module}.scale")], f"{module}.steps")
    blocks = graph.add("Add", [steps, graph.wide(f"{module}.min")], f"{module}.blocks")
    return graph.add("Reshape", [blocks, graph.sizes(*lazy.shape)], f"{module}.weight", special_zero="false")


def test_the_count_of_packed_products_sees_a_dense_one(
    untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers in another chain are right, and take eight times the memory."""
    model, known = random_model(untied), carriers.weight
    chain = lambda graph, module, lazy: (known if lazy.spec is None else dense)(graph, module, lazy)  # noqa: E731
    monkeypatch.setattr("qalora.converters.openvino.decoder.weight", chain)
    folder = written(model, tmp_path)
    assert_computes(folder, model)
    assert products(folder)["u4"] == 0


def test_a_scale_of_zero_needs_its_step(untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "TINY", 0.0)
    folder = written(random_model(untied), tmp_path)
    runtime = open_runtime("openvino", folder, threads=1)
    assert not torch.isfinite(runtime.logits(TOKENS.tolist())).all()
