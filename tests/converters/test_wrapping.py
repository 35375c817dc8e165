"""Models of text and images: the decoder is folded and exported, and everything around it stays as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from qalora import Export, Package, Verify, check, export, fold, quantize, release, train
from qalora.checkpoint import Checkpoint
from qalora.converters import load
from qalora.converters.families.wrappers import WRAPPERS
from qalora.converters.torch_module import build
from qalora.demo import demo_text
from qalora.errors import FormatError
from qalora.formats.safetensors import read_header
from qalora.inspection import inspect
from qalora.parity import verify as verify_models
from qalora.parity.weights import compare_weights
from qalora.testing import assert_same_model, random_adapter
from wrapped import sighted_model

ADAPTER: dict[str, Any] = {"seed": 1, "a_size": 0.05, "scaling": 2.0}
TOKENS = [(7 * n) % 240 for n in range(40)]


@pytest.fixture(scope="module", params=WRAPPERS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of wrapper."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of it."""
    return sighted_model(tmp_path_factory.mktemp(kind) / "model", kind)


def folded(folder: Path) -> Checkpoint:
    """Its decoder quantized, with an adapter folded into it."""
    base = quantize(load(folder), group_size=32)
    return fold(base, random_adapter(base, **ADAPTER))


@pytest.fixture(scope="module")
def model(folder: Path) -> Checkpoint:
    """Of each kind."""
    return folded(folder)


@pytest.fixture(scope="module")
def exported(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind, in formats of the whole and of text alone."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export(model, ["qalora", "gptq", "mlx", "gguf", "onnx"], out)
    return out


def whole(folder: Path) -> Any:
    """It in transformers."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return found


def features(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the decoder is given of an image."""
    with torch.no_grad():
        found: torch.Tensor = module.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return found


def close(found: torch.Tensor, model: Checkpoint) -> bool:
    """As in test_families: within 8 times what float32's own noise is in our module of the decoder."""
    module = build(model)
    wanted = logits(module)
    noise = float((logits(module.double()) - wanted).abs().max())
    return float((found - wanted).abs().max()) <= 8 * noise


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of each tensor."""
    return {name: x.contiguous().view(torch.uint8).numpy().tobytes() for name, x in tensors_of(folder).items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return {name: x.reshape(-1) for name, x in found.items()}


def carried(model: Checkpoint) -> set[str]:
    assert model.wrapper is not None
    return set(model.wrapper.carried)


def test_the_decoder_computes_what_it_does_in_the_whole(folder: Path) -> None:
    model = load(folder)
    assert close(logits(whole(folder)), model)
    assert f"the decoder of a {folder.parent.name.rstrip('0123456789')}" in model.notes[0]
    report = inspect(folder, quick=True)
    assert any("carried along" in note for note in report.notes)  # type: ignore[union-attr]
    assert "preprocessor_config.json" in report.files  # type: ignore[union-attr]


def test_our_folder_holds_the_whole(folder: Path, model: Checkpoint, exported: Path) -> None:
    """Every byte around the decoder, the config as it was published, and the same model when it is read again."""
    before, after = raw(folder), raw(exported / "qalora")
    assert carried(model) and all(after[name] == before[name] for name in carried(model))
    config = json.loads((exported / "qalora" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "qalora"
    assert config == json.loads((folder / "config.json").read_text())
    assert (exported / "qalora" / "preprocessor_config.json").read_bytes() == (
        folder / "preprocessor_config.json"
    ).read_bytes()
    again = load(exported / "qalora")
    assert_same_model(again, model)
    assert carried(again) == carried(model) and again.config == model.config
    metrics = compare_weights(again, model)
    assert metrics.total.same and metrics.tensors == len(model.tensors) + len(carried(model))
    assert not (metrics.missing or metrics.extra or metrics.config or metrics.notes)


def test_transformers_opens_our_folder(
    kind: str, folder: Path, model: Checkpoint, exported: Path, tmp_path: Path
) -> None:
    """Its decoder is ours, and what sees is the float model's; and it saves the same again."""
    module, before = whole(exported / "qalora"), whole(folder).state_dict()
    assert close(logits(module), model)
    after = module.state_dict()
    around = [name for name in before if ".language_model." not in name and ".text_model." not in name]
    around = [name for name in around if not name.startswith("lm_head")]
    assert len(around) == len(carried(model)) and all(torch.equal(after[name], before[name]) for name in around)
    if kind == "gemma3":
        pixels = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
        seen, wanted = (features(one, pixels) for one in (module, whole(folder)))
        assert wanted.abs().max() > 0 and torch.equal(seen, wanted)
    module.save_pretrained(tmp_path / "again")
    metrics = compare_weights(load(tmp_path / "again"), model)
    assert metrics.total.same and not (metrics.missing or metrics.extra or metrics.config)


def test_text_alone_is_held(model: Checkpoint, exported: Path) -> None:
    """GGUF and ONNX hold the decoder, whose weights are the same, and say what they leave out."""
    graph, file = exported / "onnx" / "model.onnx", next((exported / "gguf").glob("*.gguf"))
    for path in (graph, file):
        metrics = compare_weights(load(path), model)
        assert metrics.total.same and not (metrics.missing or metrics.extra or metrics.config)
        assert f"{len(carried(model))} tensors" in metrics.notes[0]


def test_gptq_and_mlx_hold_the_whole(kind: str, folder: Path, model: Checkpoint, exported: Path) -> None:
    """As far as mlx-lm knows it: of a SmolVLM the decoder alone, which is said."""
    before, config = raw(folder), json.loads((folder / "config.json").read_text())
    for name in ("gptq", "mlx"):
        again, after = load(exported / name), raw(exported / name)
        metrics = compare_weights(again, model, residual=name == "gptq")
        assert not (metrics.total.min_beyond or metrics.total.codes_differ or metrics.total.values_differ)
        assert not (metrics.missing or metrics.extra or metrics.config)
        if name == "mlx" and not WRAPPERS[kind].mlx:
            assert again.wrapper is None and metrics.notes
            continue
        assert carried(again) == carried(model) and all(after[one] == before[one] for one in carried(model))
        written = json.loads((exported / name / "config.json").read_text())
        assert written["model_type"] == kind and written["vision_config"] == config["vision_config"]
    text = (exported / "gptq" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in text and "AutoModelForCausalLM" not in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_proof_in_every_runtime(kind: str, folder: Path, exported: Path) -> None:
    """Weights and logits, within each runtime's own bounds, of base and adapter; the whole models opened as wholes."""
    base = quantize(load(folder), group_size=32)
    paths = [next((exported / "gguf").glob("*.gguf")), *(exported / name for name in ("gptq", "mlx", "onnx", "qalora"))]
    report = verify_models(
        base, paths, adapter=random_adapter(base, **ADAPTER), level="logits", tokens=TOKENS, threads=1
    )
    assert report.passed(), report.failure()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["smolvlm"], scope="module")
def test_an_adapter_beside_the_whole(folder: Path, tmp_path: Path) -> None:
    """transformers loads both from a GPTQ folder, and what sees is no layer of the adapter, though names end alike."""
    base = quantize(load(folder), group_size=32, zeros="integer")
    adapter = random_adapter(base, **ADAPTER)
    export(base, ["gptq"], tmp_path / "out", adapter=adapter)
    report = verify_models(
        base, [tmp_path / "out" / "gptq"], adapter=adapter, level="logits", tokens=TOKENS[:16], threads=1
    )
    assert report.passed(), report.failure()
    targets = json.loads((tmp_path / "out" / "gptq" / "adapter_config.json").read_text())["target_modules"]
    assert targets and all(name.startswith("model.text_model.layers.") for name in targets)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_release_of_the_whole(mistral: Path, tmp_path: Path) -> None:
    """A step of training, a release, and its check; then one byte of what sees is another, and the check says where."""
    base = quantize(load(mistral), group_size=32)
    data, text = tmp_path / "data.txt", tmp_path / "text.txt"
    data.write_text(demo_text()[:2000], encoding="utf-8")
    text.write_text(demo_text()[:500], encoding="utf-8")
    adapter, out = tmp_path / "adapter", tmp_path / "release"
    train(base, data=data, out=adapter, max_steps=1, rank=4, batch_size=2, max_length=32)
    options = Export(targets=("qalora", "gguf")), Package(out=out)
    release(base, *options, adapter=adapter, verify=Verify(text=text, max_tokens=32))
    assert not [one for part in check(out, base=base, text=text.read_text()).checks for one in part.findings]
    path, name = out / "qalora" / "model.safetensors", "vision_tower.patch_conv.weight"
    content = bytearray(path.read_bytes())
    content[read_header(path).entries[name].offset] ^= 1
    path.write_bytes(content)
    findings = [str(one) for part in check(out, open_artifacts=False).checks for one in part.findings]
    assert any(name in words for words in findings), findings


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def _layer_elsewhere(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name and name.startswith("language_model.")]:
        tensors[name.replace("language_model.model.", "model.language_model.")] = tensors.pop(name)


def _layer_of_no_place(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name and name.startswith("language_model.")]:
        tensors[name.replace("language_model.model.", "text.model.")] = tensors.pop(name)


def _layer_without_a_beginning(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name and name.startswith("language_model.")]:
        tensors[name.removeprefix("language_model.")] = tensors.pop(name)


def _all_elsewhere(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("language_model.")]:
        tensors[f"text.{name}"] = tensors.pop(name)


def _other_decoder(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["text_config"]["model_type"] = "mixtral"


WRONG: dict[str, tuple[Change, str]] = {
    "a layer under another beginning": (_layer_elsewhere, "language_model.model.layers. and model.language_model"),
    "a layer that is nowhere": (_layer_of_no_place, "missing tensor model.layers.1."),
    "a layer without a beginning": (_layer_without_a_beginning, "got one beside them"),
    "a decoder that is nowhere": (_all_elsewhere, "names of the decoder's tensors: .* got none"),
    "a decoder of no family": (_other_decoder, "mistral or ministral3 in a mistral3, got 'mixtral'"),
}


def changed(folder: Path, out: Path, change: Change) -> Path:
    """A copy of a model folder with a change of its tensors and its config."""
    out.mkdir()
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sighted_model(tmp_path_factory.mktemp("mistral") / "model", "mistral3")


@pytest.mark.parametrize("case", WRONG)
def test_a_decoder_that_is_not_whole_is_refused(case: str, mistral: Path, tmp_path: Path) -> None:
    change, words = WRONG[case]
    with pytest.raises(FormatError, match=words):
        load(changed(mistral, tmp_path / "model", change))


def test_numbers_that_stand_outside(mistral: Path, tmp_path: Path) -> None:
    """text_config without the vocabulary's size, and without whether the output is tied."""

    def move(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["vocab_size"] = config["text_config"].pop("vocab_size")
        config["text_config"].pop("tie_word_embeddings")

    model, before = load(changed(mistral, tmp_path / "model", move)), load(mistral)
    assert model.config["vocab_size"] == before.config["vocab_size"] and not model.tied
    assert_same_model(model, before)


def test_any_type_is_carried(mistral: Path, tmp_path: Path) -> None:
    """Halves, and integers that a model keeps beside its weights."""

    def more(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name] = tensors[name].bfloat16()
        tensors["vision_tower.position_ids"] = torch.arange(-3, 3)
        tensors["multi_modal_projector.scale"] = torch.tensor(0.1)
        tensors["multi_modal_projector.unused"] = torch.tensor([float("nan"), float("inf")])

    source = changed(mistral, tmp_path / "model", more)
    model = quantize(load(source), group_size=32)
    export(model, ["qalora", "gptq", "mlx"], tmp_path / "out")
    before = raw(source)
    for name in ("qalora", "gptq", "mlx"):
        after = raw(tmp_path / "out" / name)
        assert all(after[one] == before[one] for one in carried(model))
        metrics = compare_weights(load(tmp_path / "out" / name), model, residual=name == "gptq")
        assert not (metrics.total.values_differ or metrics.missing or metrics.extra)


def test_a_byte_that_changed_around_the_decoder_is_seen(mistral: Path, tmp_path: Path) -> None:
    """Even where both are the same number: one byte of a zero's sign."""
    name = "multi_modal_projector.linear_1.weight"

    def zero(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[name][0, 0] = 0.0

    def negative(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[name][0, 0] = -0.0
        config["vision_config"]["num_attention_heads"] = 1

    before = changed(mistral, tmp_path / "before", zero)
    metrics = compare_weights(load(changed(before, tmp_path / "after", negative)), load(before))
    assert [difference.name for difference in metrics.different] == [name]
    assert metrics.total.values_beyond == 1
    assert any("vision_config" in words for words in metrics.config)
